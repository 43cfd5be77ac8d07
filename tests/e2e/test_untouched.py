"""An installed but not enabled moescope leaves vLLM untouched."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import sys

import vllm.engine.arg_utils, vllm.entrypoints.cli.serve, vllm.plugins, vllm.v1.engine.async_llm
import vllm.model_executor.layers.fused_moe.layer, vllm.v1.worker.cpu_worker

def everything():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vllm":
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                found.update({(name, attribute, k): id(v) for k, v in vars(value).items()
                              if callable(v)})
    return found

vllm.plugins.plugins_loaded = False
before = everything()
vllm.plugins.load_general_plugins()
after = everything()
changed = [name for name in before if before[name] != after.get(name)]
loaded = [name for name in sys.modules if name.startswith("moescope")]
print(len(before), "checked; changed:", changed, "; loaded:", sorted(loaded))
changed = [n for n in changed if n != ("vllm.plugins", "plugins_loaded")]
wanted = {sys.argv[1]}
sys.exit(bool(changed) != (wanted == {"enabled"}) or not loaded)
"""


def run(mode: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MOESCOPE_")}
    env["VLLM_LOGGING_LEVEL"] = "ERROR"
    if mode == "enabled":
        env["MOESCOPE_ENABLE"] = "1"
    return subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, mode],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_not_enabled_changes_nothing() -> None:
    result = run("disabled")
    assert result.returncode == 0, result.stdout + result.stderr
    loaded = result.stdout.rsplit("loaded:", 1)[1]
    assert "capture" not in loaded
    assert "api" not in loaded


def test_the_check_sees_an_enabled_moescope() -> None:
    result = run("enabled")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "init_device" in result.stdout
    assert "create_engine_config" in result.stdout
