"""Loading never runs code, and nothing leaves the machine: the three commands under an audit hook that forbids both."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from talkers import make_talker

GUARDED = '''
import sys

ours = sys.argv[1]
FORBIDDEN = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class"}
seen = []

def watch(event, arguments):
    """Raise on what must not happen once our own work has begun (imports of torch may look around the machine)."""
    if event in FORBIDDEN:
        seen.append(event)
        raise PermissionError(f"audit: {event} {arguments!r}")
    if event in ("exec", "compile") and any(str(ours) in str(part) for part in arguments):
        raise PermissionError(f"audit: code from the model's directory: {arguments!r}")
    if event == "import" and arguments[1] and str(arguments[1]).startswith(str(ours)):
        raise PermissionError(f"audit: a module of the model's directory: {arguments!r}")

import torch, lightning.fabric, lightning.fabric.fabric, jinja2.sandbox  # what libraries do while they are imported is their own
from litlora.__main__ import main

sys.addaudithook(watch)
for words in COMMANDS:
    code = main(["--debug", *words])
    assert code == 0, (words, code)
assert not seen, seen
print("all done")
'''


def test_fine_tuning_merging_and_generating_work_offline_and_run_no_code_of_the_model(tmp_path: Path) -> None:
    """YARDSTICK S01: sockets blocked, no shell, no pickle, no code out of the model's directory, which offers some.

    Caught: an `import` of the directory's modeling file.
    """
    base = make_talker(tmp_path / "base")
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (base / name).write_text("raise SystemExit('the model ran its own code')\n")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "model_file": "modeling_evil.py"}
    (base / "config.json").write_text(json.dumps(config))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": f"{n}"}) + "\n" for n in range(8)))
    out = tmp_path / "out"
    train = ["finetune", "lora", str(base), "--data", str(rows), "--out_dir", str(out), "--train.max_steps", "2", "--accelerator", "cpu"]
    commands = [
        train,
        ["merge_lora", str(out)],
        ["generate", str(out), "--prompt", "say 1", "--max_new_tokens", "3"],
        ["evaluate", str(out), "--data", str(rows)],
        *(["finetune", method, *train[2:], "--overwrite"] for method in ("adapter", "pro", "freeze", "full")),
        ["generate", str(out), "--prompt", "say 1", "--max_new_tokens", "3"],
    ]
    script = tmp_path / "guarded.py"
    script.write_text(f"COMMANDS = {commands!r}\n{GUARDED}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), str(base)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and "all done" in done.stdout, done.stderr[-3000:]
