"""The commands of pod.sh, and static checks of the scripts, the image and the docs."""

from pathlib import Path
import re
import subprocess
import sys

ROOT = Path(__file__).parents[2]
# Values that change: the commit and the name of a launch.
CHANGING = re.compile(r"\b[0-9a-f]{12}\b|\d{8}T\d{6}Z")


def dry_run(pod, *arguments):
    """Returns the commands of a dry run, which needs no gcloud."""
    output = pod(*arguments, "--dry-run", TMPDIR="/tmp")
    assert pod.calls() == []
    return CHANGING.sub("ID", output).splitlines()


def test_dry_run_prints_the_commands(pod):
    where = "--zone=us-east5-b --project=project"
    tpus = "gcloud compute tpus"
    state = f"{tpus} queued-resources describe run '--format=value(state.state)' {where}"
    ssh = f"{tpus} queued-resources ssh run --node=all --worker=all --batch-size=all --quiet"
    worker = "bash grit-jax/code/tpu_scripts/worker.sh"
    create = [
        state,
        f"{tpus} tpu-vm accelerator-types describe v6e-16 '--format=value(type)' {where}",
        f"{tpus} tpu-vm describe run '--format=value(state)' {where}",
        "# run: 16 chips, per hour 16 chip-hours; for a run, set RUN_HOURS to the hours that"
        " grit-jax plan prints (docs/pods.md)",
        f"{tpus} queued-resources create run --accelerator-type=v6e-16"
        f" --runtime-version=v2-alpha-tpuv6e --node-id=run --spot {where}",
        state,
    ]
    setup = [
        "git archive --format=tar.gz --output=/tmp/grit-jax-ID.tar.gz ID",
        "gcloud storage cp --quiet /tmp/grit-jax-ID.tar.gz gs://bucket/run/code/ID.tar.gz",
        "rm /tmp/grit-jax-ID.tar.gz",
        f"{ssh} '--command=mkdir -p grit-jax/ID &&"
        " gcloud storage cat gs://bucket/run/code/ID.tar.gz | tar -xzf - -C grit-jax/ID &&"
        " bash grit-jax/ID/tpu_scripts/worker.sh setup ID"
        f" gs://bucket/weights' {where}",
        f"{ssh} '--command={worker} check 16' {where}",
    ]
    launch = "gs://bucket/run/launches/ID"
    announce = f"echo ID | gcloud storage cp - {launch}/commit"
    start = (
        f"{ssh} '--command=LOG_SECONDS=0.2 {worker} start ID {launch} --config"
        " configs/gritlm_7b.py --workdir gs://bucket/run/run --config.data.folder=gs://bucket/data"
        r" --config.data.embedding=words\ \(2\) --config.model.weights=$HOME/grit-jax/weights'"
        f" {where}"
    )
    mark = "echo stopped | gcloud storage cp - gs://bucket/run/launches/NEWEST/stopped"
    launches = "gcloud storage ls gs://bucket/run/launches/"
    delete = f"{tpus} queued-resources delete run --force --quiet {where}"
    assert dry_run(pod, "create") == create
    assert dry_run(pod, "setup") == setup
    assert dry_run(pod, "launch") == [announce, start]
    assert dry_run(pod, "stop") == [
        launches,
        mark,
        state,
        f"{ssh} '--command=STOP_SECONDS=20 {worker} stop' {where}",
    ]
    assert dry_run(pod, "status") == [
        state,
        f"{tpus} tpu-vm describe run '--format=value(state)' {where}",
        f"{ssh} '--command={worker} status' {where}",
        launches,
        "gcloud storage cat gs://bucket/run/run/metrics.jsonl",
    ]
    assert dry_run(pod, "delete") == [launches, mark, state, delete]
    changes = [line for line in dry_run(pod, "watch") if not is_question(line)]
    made = [line for line in [*create, *setup] if not is_question(line)]
    assert changes == [announce, *made, start, delete]


def is_question(line):
    return " describe " in line or line.startswith("gcloud storage ls")


def test_accelerator_types(pod):
    versions = {
        "v6e-8": ("v2-alpha-tpuv6e", 8),
        "v5litepod-256": ("v2-alpha-tpuv5-lite", 256),
        "v5p-128": ("v2-alpha-tpuv5", 64),
        "v4-32": ("tpu-ubuntu2204-base", 16),
        "v3-32": ("tpu-ubuntu2204-base", 32),
    }
    for accelerator_type, (version, devices) in versions.items():
        pod.set(ACCELERATOR_TYPE=accelerator_type, NUM_SLICES="2", PROVISIONING="on-demand")
        (create,) = [line for line in dry_run(pod, "create") if " create " in line]
        assert f"--runtime-version={version} --node-count=2 --node-prefix=run --zone" in create
        assert f"worker.sh check {2 * devices}'" in dry_run(pod, "setup")[-1]


def test_dry_run_prints_chip_hours_and_their_cost(pod):
    def cost(**settings):
        pod.set(**settings)
        (line,) = [line for line in dry_run(pod, "watch") if line.startswith("#")]
        return line

    per_hour = cost(NUM_SLICES="2", PRICE_PER_CHIP_HOUR="2.7")
    assert per_hour.startswith("# run: 32 chips, per hour 32 chip-hours, 86.40 at 2.7 each; for")
    chips = {"v5p-128": 64, "v3-32": 16, "v5litepod-256": 256}
    for accelerator_type, number in chips.items():
        line = cost(ACCELERATOR_TYPE=accelerator_type, RUN_HOURS="26.5")
        assert (
            line
            == f"# run: {number} chips for 26.5 hours (RUN_HOURS): {26.5 * number:g} chip-hours"
        )
    line = cost(RUN_HOURS="10", PRICE_PER_CHIP_HOUR="1.35")
    assert line == "# run: 16 chips for 10 hours (RUN_HOURS): 160 chip-hours, 216.00 at 1.35 each"
    pod.set()


def test_example_settings_need_only_project_zone_and_bucket(pod):
    example = (ROOT / "tpu_scripts" / "settings.example.sh").read_text()
    (pod.clone / "tpu_scripts" / "settings.sh").write_text(example)
    assert "PROJECT is empty" in pod("create", code=2)
    for name in ("PROJECT", "ZONE", "BUCKET"):
        example = example.replace(f'{name}=""', f'{name}="my-own"')
    (pod.clone / "tpu_scripts" / "settings.sh").write_text(example)
    assert "worker.sh check 64'" in dry_run(pod, "setup")[-1]
    pod.set()


def test_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = [f"tpu_scripts/{name}.sh" for name in ("pod", "worker", "settings.example")]
    finished = subprocess.run(
        [shellcheck, "--check-sourced", *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_devices_are_counted_as_in_training():
    finished = subprocess.run(
        [sys.executable, "tpu_scripts/check_devices.py", "4"],
        cwd=ROOT,
        env={"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert "found 0 TPU devices, expected 4" in finished.stderr


def test_image_contains_what_it_installs():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    instructions = dict(line.split(" ", 1) for line in lines if line[:1].isupper())
    copied = [
        name
        for line in lines
        if line.startswith("COPY")
        for name in line.removeprefix("COPY ").split()[:-1]
    ]
    assert all((ROOT / name).exists() for name in copied)
    needed = {"setup.py", "constraints.txt", "grit_jax", "configs", "README.md"}
    assert needed <= set(copied)
    options = '--constraint constraints.txt --editable ".[tpu]"'
    assert instructions["RUN"] == f"pip install --no-cache-dir {options}"
    assert f"pip install {options}" in (ROOT / "docs" / "training.md").read_text()
    assert f"pip install --quiet {options}" in (ROOT / "tpu_scripts" / "worker.sh").read_text()
    assert instructions["ENV"] == "JAX_PLATFORMS=tpu,cpu"
    assert f"export {instructions['ENV']}" in (ROOT / "tpu_scripts" / "worker.sh").read_text()
    assert instructions["ENTRYPOINT"] == '["grit-jax"]'


def test_docs_name_existing_commands_and_settings(pod):
    help_text = pod("--help")
    settings = (ROOT / "tpu_scripts" / "settings.example.sh").read_text()
    text = (ROOT / "docs" / "pods.md").read_text()
    for verb in re.findall(r"pod\.sh ([a-z]+)", text):
        assert f"\n  {verb} " in help_text
    for name in re.findall(r"`([A-Z]+(?:_[A-Z]+)*)=", text):
        assert f"\n{name}=" in settings
