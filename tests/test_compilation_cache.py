"""Programs that one process compiles are loaded by the next one."""

import json
import os

from command_line import run_python
import pytest

SCRIPT = """
import json, sys
import jax

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

from grit_jax import GritLM
import reference_values

model = GritLM.from_pretrained(reference_values.FOLDER / "tiny-mistral", dtype="float32")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
model.encode([[5, 6, 7]])
model.generate([5, 6, 7], 2)
hits = events.count("/jax/compilation_cache/cache_hits")
print(json.dumps([hits, events.count("/jax/compilation_cache/cache_misses")]))
"""


@pytest.mark.slow
def test_a_later_process_loads_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{os.path.dirname(__file__)}")
    folder = tmp_path / "grit_jax" / "compiled"

    def run():
        finished = run_python(SCRIPT, cwd=tmp_path)
        assert finished.returncode == 0, finished.stderr
        # Only a slow machine prints lines.
        assert all("compiling the program" in line for line in finished.stderr.splitlines())
        return json.loads(finished.stdout)

    _, num_compiled = run()
    assert num_compiled >= 3 and folder.stat().st_mode & 0o077 == 0
    # A process was killed while it wrote one of the programs.
    programs = sorted(folder.glob("*-cache"))
    unfinished = next(path for path in programs if "_embed_packed" in path.name)
    unfinished.write_bytes(unfinished.read_bytes()[:100])
    unfinished.with_name(unfinished.name.removesuffix("-cache") + "-atime").unlink()
    assert run() == [num_compiled - 1, 1]
    assert run() == [num_compiled, 0]
