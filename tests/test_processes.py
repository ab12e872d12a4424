"""Processes that cannot connect fail first, with an error that names what is missing."""

from command_line import assert_fails_in_one_line, grit_jax_in_process, run_python
import jax
import pytest

from grit_jax.processes import exit_now


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_COORDINATOR_ADDRESS=localhost is not of the form HOST:PORT",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:123456",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_COORDINATOR_ADDRESS=localhost:123456 is not of the form HOST:PORT",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1234",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID=2, but with JAX_NUM_PROCESSES=2 they are 0 to 1",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1234",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES=two is not a number",
        ),
    ],
)
def test_a_mistake_in_the_environment_is_named(tmp_path, monkeypatch, environment, named):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "config.py"
    config.write_text("from grit_jax.config import default_config as get_config\n")
    finished = grit_jax_in_process("train", f"--config={config}", cwd=tmp_path)
    assert_fails_in_one_line(finished, "ProcessError", named)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py"]


def test_the_end_of_a_command_starts_no_backend(monkeypatch):
    def count():
        pytest.fail("process_count() starts a backend")

    monkeypatch.setattr(jax, "process_count", count)
    with pytest.raises(SystemExit) as caught:
        exit_now(2)
    assert caught.value.code == 2


def test_libtpu_prints_nothing_on_a_machine_without_tpus(tmp_path, monkeypatch):
    for name in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    program = (
        "import jax\n"
        "from grit_jax.processes import skip_absent_tpu\n"
        "skip_absent_tpu()\n"
        "print(jax.devices()[0].platform, jax.config.jax_platforms)\n"
    )
    finished = run_python(program, cwd=tmp_path)
    assert (finished.stdout, finished.stderr) == ("cpu cpu\n", "")


def test_a_process_that_the_others_do_not_join_says_what_it_waits_for(tmp_path, monkeypatch):
    # As in five minutes, in a few seconds; then JAX ends the process.
    program = (
        "import functools, jax\n"
        "from grit_jax import processes\n"
        "initialize = functools.partial(jax.distributed.initialize, initialization_timeout=3)\n"
        "jax.distributed.initialize, processes.CONNECTION_WARNING_SECONDS = initialize, 0.5\n"
        "processes.connect()\n"
    )
    for name, value in {"COORDINATOR_ADDRESS": "localhost:1", "NUM_PROCESSES": "2"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    finished = run_python(program, cwd=tmp_path)
    assert finished.returncode != 0
    first_line = finished.stderr.splitlines()[0]
    assert "JAX_NUM_PROCESSES=2 of them" in first_line
    assert "JAX_COORDINATOR_ADDRESS=localhost:1, which is HOST:PORT" in first_line
