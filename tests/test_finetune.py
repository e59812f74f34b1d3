"""`litlora finetune METHOD`, for every method, as it is typed: what a run leaves behind, what becomes of an intermediate step, and what
is refused. (The arithmetic of a step: test_train.py; of a method: test_promises.py.)
"""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, random_tokens, randomise, tiny_hf_config
from safetensors.torch import load_file, save_file
from talkers import byte_tokenizer

import litlora
from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.fingerprint import fingerprint
from litlora.checkpoint.resolve import list_steps, resolve
from litlora.checkpoint.weights import load_model
from litlora.families import LLAMA_PRO_LAYERS, config_from_hf, expected_tensors
from litlora.methods import METHODS
from litlora.methods.attach import blocks, trainable
from litlora.model import GPT, silent_copy
from litlora.train.metrics import read

TYPED = {  # what comes after `litlora finetune`: every method, and the variants whose steps are made in other ways
    "lora": "lora --lora.r 4 --lora.dropout 0.1",
    "lora plus": "lora --lora.r 4 --lora.lr_ratio 4 --lora.use_rslora true",
    "pissa": "lora --lora.r 4 --lora.init pissa",
    "dora": "lora --lora.r 4 --lora.use_dora true",
    "lora whole": "lora --lora.r 4 --lora.modules_to_save norm lm_head",
    "prompt": "adapter --adapter.kind prompt --adapter.layers last:3 --adapter.length 4 --train.lr 1e-1",  # one gate moves little
    "scale_shift": "adapter --adapter.kind scale_shift",
    "series": "adapter --adapter.kind series --adapter.width 6",
    "parallel": "adapter --adapter.kind parallel --adapter.width 6 --adapter.modules_to_save norm",
    "pro": "pro --pro.n_insert 2",
    "freeze": "freeze --freeze.layers last:1 --freeze.modules mlp --freeze.extra_modules norm lm_head",
    "full": "full",
}
UNMERGEABLE = {"prompt": "a learnt prompt", "series": "a bottleneck with an activation", "parallel": "a bottleneck with an activation"}
IN_PEFT = ("lora", "lora plus", "pissa", "dora", "lora whole", "prompt")
SMALL = "--train.global_batch_size 2 --train.lr 1e-2 --train.lr_warmup_steps 2 --threads 1 --accelerator cpu"
TWELVE = "--train.max_steps 12 --train.save_interval 4 --eval.interval 4"
BRIEF = ["--max_new_tokens", "12", "--temperature", "0", "--threads", "1", "--precision", "fp32"]
VOLATILE = ("seconds", "tokens_per_second", "memory_mb")
TOKENS = random_tokens(2, 15, vocab_size=256)


@dataclass(frozen=True)
class Place:
    """Where the tests of this file work: bases in bf16, rows, and the runs made so far."""

    path: Path
    base: Path
    tied: Path
    rows: Path
    heldout: Path
    runs: dict[str, "Ran"] = field(default_factory=dict)

    def typed(self, label: str, out: Path, *more: str, base: Path | None = None) -> list[str]:
        """The words of a run of TYPED[label] in `out`; words of `more` come last, and so win."""
        method, _, own = TYPED.get(label, label).partition(" ")
        words = f"finetune {method} --checkpoint_dir {base or self.base} --data {self.rows} --eval.data {self.heldout}"
        return [*f"{words} --out_dir {out} {SMALL} {own}".split(), *(word for each in more for word in each.split())]

    def run(self, label: str) -> "Ran":
        """The run of twelve steps that this file's tests look at, trained when it is first asked for."""
        if label not in self.runs:
            out = self.path / label.replace(" ", "-")
            self.runs[label] = Ran(label, out, *ran(self.typed(label, out, TWELVE)))
        return self.runs[label]


@dataclass(frozen=True)
class Ran:
    label: str
    out: Path
    code: int
    printed: str
    said: str

    @property
    def word(self) -> str:
        """The method's."""
        return TYPED[self.label].split()[0]

    def step(self, number: int) -> Path:
        return self.out / names.step_name(number)


def ran(words: list[str], stdin: str = "") -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in this process."""
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(words)
        return code, out.getvalue(), err.getvalue()
    finally:
        sys.stdin = before


def did(words: list[str], stdin: str = "") -> str:
    """Standard output of a command that succeeds."""
    code, printed, said = ran(words, stdin)
    assert code == 0, said
    return printed


def refused(words: list[str], code: int = 2) -> str:
    """What a refused command says: one error, no traceback, nothing on standard output."""
    found, printed, said = ran(words)
    assert found == code, said
    assert said.count("error: ") == 1 and "Traceback" not in said and not printed
    return said[said.index("error: ") :]


def make_base(path: Path, *, dtype: torch.dtype = torch.bfloat16, expanded: bool = False, **changes: Any) -> Path:
    """A Llama of four layers that can be talked to, H x D = C as PEFT's prompts need it. `expanded`: its third block is a silent copy."""
    given = {"vocab_size": 288, "head_dim": 10, "num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 128}
    values = {**tiny_hf_config("llama", **given, eos_token_id=257, **changes), "architectures": ["LlamaForCausalLM"]}
    model = randomise(GPT(config_from_hf(values, names.CONFIG)))
    if expanded:
        values[LLAMA_PRO_LAYERS] = [2]
        model.model.layers[2] = silent_copy(blocks(model)[1])
    path.mkdir(parents=True)
    save_file({name: p.detach().to(dtype).contiguous() for name, p in model.named_parameters()}, path / names.WEIGHTS, {"format": "pt"})
    (path / names.CONFIG).write_text(json.dumps({**values, "dtype": str(dtype).removeprefix("torch.")}))
    return byte_tokenizer(path)


def write_rows(path: Path, words: str) -> Path:
    """A row that asks for each word."""
    rows = ({"instruction": f"Say {word}.", "output": f"{word} and {word} and {word}"} for word in words.split())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    path = tmp_path_factory.mktemp("finetune")
    for name, words in (("rows", "one two three four five six seven eight nine ten"), ("heldout", "red green blue")):
        write_rows(path / f"{name}.jsonl", words)
    tied = make_base(path / "tied", tie_word_embeddings=True)
    return Place(path, make_base(path / "base"), tied, path / "rows.jsonl", path / "heldout.jsonl")


@pytest.fixture(scope="module", params=TYPED)
def run(request: pytest.FixtureRequest, place: Place) -> Ran:
    """A run of each method: ten rows, so that epochs end at steps 5 and 10; steps 4, 8 and 12 committed and validated."""
    done = place.run(request.param)
    assert done.code == 0, done.said
    return done


def manifest(step: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((step / names.MANIFEST).read_text())
    return values


def loss(place: Place, path: Path, precision: str = "fp32") -> float:
    """What `litlora evaluate` finds on the rows held out."""
    words = ["--exact_match", "false", "--json", "--threads", "1", "--precision", precision]
    shown = did(["evaluate", str(path), "--data", str(place.heldout), *words])
    return float(json.loads(shown)["loss"])


def files_of(step: Path) -> dict[str, torch.Tensor]:
    """The weights in a step."""
    found = [name for name in (names.ADAPTER_WEIGHTS, names.OWN_ADAPTER_WEIGHTS, names.WEIGHTS) if (step / name).exists()]
    assert len(found) == 1, found
    return load_file(step / found[0])


def tuned(step: Path) -> GPT:
    return load_model(resolve(step), dtype=torch.float32).eval()


@torch.no_grad()
def apart(ours: Any, theirs: Any) -> float:
    """How far two models' logits differ, as a share of the largest."""
    one, other = (found if isinstance(found, torch.Tensor) else found.logits for found in (ours(TOKENS), theirs(TOKENS)))
    return float((one - other).abs().max() / max(1.0, float(other.abs().max())))


def test_every_method_is_in_the_table() -> None:
    assert {words.split()[0] for words in TYPED.values()} == set(METHODS)


# ---- a run, and its intermediate steps -------------------------------------------------------------------------------


def test_a_run_commits_steps_of_one_kind(run: Ran) -> None:
    """Promise 4, A03: each intermediate step is whole and has the last one's files and tensors: as many numbers as the run says that learn.

    Standard output is the last step alone; progress goes to standard error.
    """
    assert run.printed == f"{run.step(12)}\n"
    assert [line for line in run.said.splitlines() if line.startswith("COMMITTED")] == [
        f"COMMITTED step={number} val_loss={manifest(run.step(number))['val_loss']:.4f}" for number in (4, 8, 12)
    ]
    assert [(step.number, step.is_whole) for step in list_steps(run.out)] == [(4, True), (8, True), (12, True)]
    state = {names.TRAINING_STATE, names.TRAINING_STATE_META}
    kinds = [{path.name for path in run.step(number).iterdir() if path.is_file()} - state for number in (4, 8, 12)]
    shapes = [{name: tensor.shape for name, tensor in files_of(run.step(number)).items()} for number in (4, 8, 12)]
    assert kinds[0] == kinds[1] == kinds[2]
    assert shapes[0] == shapes[1] == shapes[2]
    count = sum(parameter.numel() for parameter in files_of(run.step(12)).values())
    shown = next(line.split()[1] for line in run.said.splitlines() if line.startswith("trained "))
    assert shown == litlora.console.count(count // 2 if run.label == "pissa" else count)  # its file has both ends of the way, so twice
    assert manifest(run.step(4))["method"] == run.word


def test_what_to_type_next_can_be_typed(place: Place, tmp_path: Path) -> None:
    """Caught: a directory with a space in its name was two words."""
    out = tmp_path / "my run"
    words = place.typed("lora", tmp_path, "--train.max_steps 1")
    words[words.index(str(tmp_path))] = str(out)
    said = ran(words)[2]
    for line in (
        f"litlora chat '{out}'",
        f"litlora evaluate '{out}/step-1' --compare_base",
        f"litlora merge_lora --checkpoint_dir '{out}/step-1'",
    ):
        assert line in said


def test_rows_of_the_demo_are_not_taken_for_ones_own(place: Place, tmp_path: Path) -> None:
    """Caught: a step that was copied out of its run was measured on the demo's rows, and only the header's last words told."""
    words = ["--exact_match", "false", "--max_samples", "2", "--threads", "1"]
    for more, count in (([], 1), (["--data", str(place.heldout)], 0)):
        assert ran(["evaluate", str(place.base), *more, *words])[2].count("warning: these are the demo's rows") == count


def test_a_step_is_served_as_it_was_validated(run: Ran, place: Place) -> None:
    """Promise 4, A08: `evaluate` finds the validation loss that the run measured at step 4, not the base's; of the run, its best step's.

    Steps of `full` are rounded to the base's bf16. Caught: evaluating a step without its modules trained whole.
    """
    rounding = 2e-2 if run.label == "full" else 1e-5
    losses = {number: float(manifest(run.step(number))["val_loss"]) for number in (4, 8, 12)}
    assert loss(place, run.step(4)) == pytest.approx(losses[4], rel=rounding)
    assert loss(place, run.out) == pytest.approx(min(losses.values()), rel=rounding)
    assert abs(loss(place, place.base) - losses[4]) > (5e-3 if run.label == "prompt" else 0.1)


@pytest.mark.parametrize("label", ["lora whole", "pissa", "prompt", "scale_shift", "pro", "full"])
def test_a_step_computed_in_bf16_is_served_as_it_was_validated(place: Place, tmp_path: Path, label: str) -> None:
    """The same where training computes in bf16, as on a GPU: what is kept in fp32 is rounded where it is used, in both alike."""
    did(place.typed(label, tmp_path / "out", "--precision bf16 --train.max_steps 3 --train.save_interval 2 --eval.interval 2"))
    for number in (2, 3):
        step = tmp_path / "out" / names.step_name(number)
        assert loss(place, step, "bf16") == pytest.approx(manifest(step)["val_loss"], rel=1e-6)


def test_a_step_answers_in_every_command_alike(run: Ran, place: Place) -> None:
    """Promise 9: generate, chat on a pipe and the Python API say the same of step 4, and something else than the base.

    Of a run they take its best step.
    """
    asked = "Go on, go on"
    answer = did(["generate", str(run.step(4)), "--prompt", asked, *BRIEF])
    assert answer == did(["chat", str(run.step(4)), *BRIEF], f"{asked}\n")
    assert answer == litlora.generate(GPT.from_pretrained(run.step(4), dtype=torch.float32), asked, max_new_tokens=12) + "\n"
    plain = did(["generate", str(place.base), "--prompt", asked, *BRIEF])
    assert len(answer) > 8 and answer != plain
    if run.label != "full":  # put on for one answer, and off again
        model = GPT.from_pretrained(place.base, dtype=torch.float32)
        for adapter, wanted in ((run.step(4), answer), (None, plain)):
            assert litlora.generate(model, asked, adapter_path=adapter, max_new_tokens=12) + "\n" == wanted
    best = min((4, 8, 12), key=lambda number: manifest(run.step(number))["val_loss"])
    assert did(["generate", str(run.out), "--prompt", asked, *BRIEF]) == did(["generate", str(run.step(best)), "--prompt", asked, *BRIEF])


def test_a_step_merges_into_a_plain_model_or_is_refused_with_the_reason(run: Ran, place: Place) -> None:
    """N05, A07: transformers loads the merged step with the step's own logits; the merge keeps the base's dtype unless told otherwise.

    What computes more than weights can hold is refused before anything is written (F16's exit code 2), and its run said so in its header.
    """
    from transformers import AutoModelForCausalLM

    step, target = run.step(4), place.path / f"merged-{run.out.name}"
    if run.label in UNMERGEABLE or run.label == "full":
        shown = refused(["merge_lora", str(step), "--out_dir", str(target)])
        assert ("cannot be merged: " + UNMERGEABLE[run.label] if run.label in UNMERGEABLE else "whole model") in shown
        assert not target.exists() and not (step / names.MERGED).exists()
        assert ("not possible: " in run.said) == (run.label in UNMERGEABLE)
        assert "merge_lora" not in run.said
        return
    assert f"litlora merge_lora --checkpoint_dir {run.step(12)}" in run.said
    assert did(["merge_lora", str(step), "--out_dir", str(target), "--dtype", "float32", "--verify", "full"]) == f"{target}\n"
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    assert apart(tuned(step), theirs) <= 1e-5
    assert apart(tuned(place.base), theirs) > 1e-2
    did(["merge_lora", "--checkpoint_dir", str(step)])
    merged = load_file(step / names.MERGED / names.WEIGHTS)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert loss(place, step / names.MERGED) == pytest.approx(manifest(step)["val_loss"], rel=2e-2)
    new = {name for name in merged if name not in expected_tensors(resolve(place.base).config())}
    assert bool(new) == (run.label in ("pro", "scale_shift"))


def test_a_step_loads_elsewhere_as_it_is(run: Ran, place: Place) -> None:
    """Promise 4, N02: PEFT loads what it knows, transformers a step of `full`, with our logits; its README names these and no others."""
    from transformers import AutoModelForCausalLM

    step = run.step(4)
    card = (step / names.README).read_text()
    assert (step / names.ADAPTER_CONFIG).exists() == (run.label in IN_PEFT) == ("## PEFT" in card)
    assert ("## transformers" in card) == (run.label == "full")
    assert ("merge_lora" in card) == (run.label not in UNMERGEABLE and run.label != "full")
    if run.label in IN_PEFT:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(place.base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, str(step)).eval()
        assert apart(tuned(step), theirs) <= 1e-5
        assert apart(tuned(place.base), theirs) > 1e-4
    elif run.label == "full":
        theirs = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32).eval()
        assert apart(tuned(step), theirs) <= 1e-5
        assert apart(tuned(place.base), theirs) > 1e-2


# ---- going on --------------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
import lightning_fabric, torch, litlora.commands.finetune  # what takes long; nothing was computed, so each fork is a fresh process
from litlora.__main__ import main
from litlora.train.metrics import Metrics

def dies_before(step):
    write = Metrics.write
    def deadly(self, **values):
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, **values)
    Metrics.write = deadly

torch.set_num_threads(1)
for line in sys.stdin:
    step, words = json.loads(line)
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        dies_before(step)
        os._exit(main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def processes() -> Iterator["subprocess.Popen[str]"]:
    """A process that runs commands in processes of their own, each killed (-9) as it is about to log a certain step."""
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def killed(processes: "subprocess.Popen[str]", step: int, words: list[str]) -> None:
    assert processes.stdin is not None and processes.stdout is not None
    processes.stdin.write(json.dumps([step, words]) + "\n")
    processes.stdin.flush()
    assert processes.stdout.readline() == "-9\n"


def test_a_run_killed_twice_ends_with_the_same_bits(run: Ran, place: Place, processes: "subprocess.Popen[str]") -> None:
    """R01, R02, F04, promise 3: kill -9 before the first commit, again beside the second; `--resume`; every file of the last step but
    those that name the directory is the uninterrupted run's, byte for byte: weights, optimizer, masters; and so are the metrics.

    The base is bf16, so what a step of `full` holds is rounded: its fp32 weights must lie in the training state. Caught: not keeping them.
    """
    out = place.path / f"killed-{run.out.name}"
    resume = ["finetune", run.word, "--resume", "--out_dir", str(out)]
    killed(processes, 3, place.typed(run.label, out, TWELVE))
    assert not list_steps(out)
    killed(processes, 9, resume)  # step-8 is on its way: it began once step-4 was durable
    assert [step.number for step in list_steps(out)] in ([4], [4, 8])
    assert did(resume) == f"{out / 'step-12'}\n"
    for number in (8, 12):
        ours, theirs = out / names.step_name(number), run.step(number)
        same = {path.name for path in theirs.iterdir() if path.is_file()} - {names.MANIFEST, names.README, names.TRAINING_STATE_META}
        assert {names.TRAINING_STATE} < same
        for name in same:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
        one, other = (manifest(path) for path in (ours, theirs))
        assert {key for key in one if one[key] != other[key]} <= {"parent", "lineage", "files", "sha256"}
        states = [json.loads((path / names.TRAINING_STATE_META).read_text())["values"] for path in (ours, theirs)]
        assert states[0] == states[1]
    logged = [
        [{key: value for key, value in row.items() if key not in VOLATILE} for row in read(each / names.METRICS)] for each in (out, run.out)
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 13


def test_training_goes_on_from_a_step_by_its_own_method_alone(run: Ran, place: Place) -> None:
    """DESIGN section 5: the same method and shapes begin another run at the step's weights, the parent recorded; any other is refused.

    The first validation of the new run is the step's own. Caught: a step's weights not loaded before training.
    """
    step, out = run.step(8), place.path / f"more-{run.out.name}"
    other = "freeze" if run.word != "freeze" else "lora"
    if run.label != "full":
        shown = refused(place.typed(other, out, "--train.max_steps 1", base=step))
        assert str(step) in shown and f"trained by {run.word}" in shown and other in shown and "merge" in shown
        assert not out.exists()
    did(place.typed(run.label, out, "--train.max_steps 1", base=step))
    rounding = 2e-2 if run.label == "full" else 1e-5
    assert float(read(out / names.METRICS)[0]["val_loss"]) == pytest.approx(manifest(step)["val_loss"], rel=rounding)
    assert manifest(out / "step-1")["parent"] == str(step)
    shapes = [{name: tensor.shape for name, tensor in files_of(path).items()} for path in (step, out / "step-1")]
    assert shapes[0] == shapes[1]


OTHER_SHAPES = [
    ("lora", "--lora.r 8", "r=4"),
    ("lora", "--lora.use_dora true", "use_dora"),
    ("lora", "--lora.target_modules q_proj", "k_proj.adapter"),
    ("lora whole", "--lora.modules_to_save embed_tokens", "whole"),
    ("parallel", "--adapter.width 7", "width=6"),
    ("parallel", "--adapter.kind series", "parallel"),
    ("prompt", "--adapter.length 5", "length=4"),
    ("pro", "--pro.n_insert 1", "inserted"),
    ("freeze", "--freeze.modules self_attn", "whole"),
]


@pytest.mark.parametrize(("label", "changed", "named"), OTHER_SHAPES)
def test_another_shape_does_not_go_on_from_a_step(place: Place, tmp_path: Path, label: str, changed: str, named: str) -> None:
    """DESIGN section 5: the difference is named, and nothing is written; nor does a resumed run take another shape (R04)."""
    done = place.run(label)
    shown = refused(place.typed(label, tmp_path / "out", "--train.max_steps 1", changed, base=done.step(8)))
    assert named in shown and "there" in shown and "here" in shown
    assert not (tmp_path / "out").exists()
    before = {path: path.read_bytes() for path in done.out.rglob("*") if path.is_file()}
    shown = refused(["finetune", done.word, "--resume", "--out_dir", str(done.out), *changed.split()])
    assert "cannot be resumed" in shown and " then, " in shown
    assert {path: path.read_bytes() for path in done.out.rglob("*") if path.is_file() and path.name != names.LOCK} == before


@pytest.mark.parametrize("label", ["lora", "full"])
def test_overwrite_never_deletes_what_training_starts_from(place: Place, tmp_path: Path, label: str) -> None:
    """Nothing is lost by a mistyped option: a run that begins at a step of its own directory is refused, and every step stays whole."""
    out = Path(shutil.copytree(place.run(label).out, tmp_path / "out"))
    shown = refused(place.typed(label, out, "--train.max_steps 1 --overwrite", base=out / "step-8"))
    assert str(out) in shown
    assert [(step.number, step.is_whole) for step in list_steps(out)] == [(4, True), (8, True), (12, True)]


@pytest.mark.parametrize("label", ["lora", "pro", "full"])
def test_a_run_is_not_resumed_on_another_base(place: Place, tmp_path: Path, label: str) -> None:
    """R04: whatever lies in the base's directory now, it is not what the run began on."""
    base, out = Path(shutil.copytree(place.base, tmp_path / "base")), tmp_path / "out"
    did(place.typed(label, out, "--train.max_steps 2 --eval.interval 0", base=base))
    weights = load_file(base / names.WEIGHTS)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 2}, base / names.WEIGHTS, {"format": "pt"})
    shown = refused(["finetune", TYPED[label].split()[0], "--resume", "--out_dir", str(out), "--train.max_steps", "3"])
    assert "base" in shown
    assert [step.number for step in list_steps(out)] == [2]


# ---- words that mean nothing -----------------------------------------------------------------------------------------

WRONG = [  # what is typed, on which base; words of the error
    ("lora --lora.layers 99", "base", ["layers", "99", "0 to 3"]),
    ("lora --lora.layers middle", "base", ["middle", "last:2"]),
    ("lora --lora.target_modules q_prj", "base", ["q_prj", "q_proj", "down_proj", "all-linear"]),
    ("lora --lora.modules_to_save nrm", "base", ["modules_to_save", "nrm", "norm", "embed_tokens"]),
    ("lora --lora.rank_pattern w1=4", "base", ["rank_pattern", "w1"]),
    ("lora --lora.untie true", "base", ["untie", "already"]),
    ("lora --lora.target_modules lm_head", "tied", ["lm_head", "--lora.untie true"]),
    ("lora --lora.init pissa --lora.use_dora true", "base", ["pissa", "DoRA"]),
    ("adapter --adapter.layers 2-9", "base", ["layers", "2-9", "0 to 3"]),
    ("adapter --adapter.kind scale_shift --adapter.target_modules gate", "base", ["gate", "gate_proj"]),
    ("adapter --adapter.kind prefix", "base", ["prefix", "prompt", "parallel"]),
    ("adapter --adapter.untie true", "base", ["untie", "already"]),
    ("pro --pro.n_insert 2 --pro.positions 0", "base", ["n_insert", "positions"]),
    ("pro --pro.n_insert 5", "base", ["n_insert", "from 1 to 4"]),
    ("pro --pro.positions 4", "base", ["positions", "0 to 3"]),
    ("pro --pro.modules_to_save head", "base", ["head", "lm_head"]),
    ("freeze --freeze.layers 4", "base", ["layers", "0 to 3"]),
    ("freeze --freeze.modules attn", "base", ["modules", "attn", "self_attn"]),
    ("freeze --freeze.extra_modules self_attn", "base", ["extra_modules", "self_attn", "embed_tokens"]),
    ("freeze --freeze.untie true", "base", ["untie", "already"]),
    ("full --full.untie true", "base", ["untie", "already"]),
    ("full --full.layers 1", "base", ["layers"]),
    ("fulll", "base", ["fulll", "full"]),
]


@pytest.mark.parametrize(("words", "on", "told"), WRONG)
def test_a_word_that_means_nothing_is_refused_with_those_that_do(
    place: Place, tmp_path: Path, words: str, on: str, told: list[str]
) -> None:
    """Promise 12: exit code 2, the option, the word and the names that exist; nothing is written. Caught: making the directory first."""
    shown = refused(place.typed(words, tmp_path / "out", base=getattr(place, on)))
    assert all(each in shown for each in told), shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["finetune lora", "finetune full", "pretrain"])
def test_a_run_inside_its_base_is_refused_before_it_begins(command: str, place: Place, tmp_path: Path) -> None:
    """Caught: trained there, and then no step of it could be merged where it is: no command writes into a base."""
    out = place.base / "run"
    code, _, said = ran([*command.split(), str(place.base), "--data", str(place.rows), "--out_dir", str(out), *SMALL.split()])
    assert code == 2 and "no command writes into a base" in said and "--out_dir another directory" in said
    assert not out.exists()


def test_a_run_on_the_demos_rows_says_so(place: Place, tmp_path: Path) -> None:
    """Caught: a base of one's own, --data forgotten, and nothing but a number of rows to tell it by."""
    words = ["finetune", "lora", str(place.base), "--dry_run", "--train.max_steps", "1", "--out_dir", str(tmp_path / "out")]
    assert "\ndata      the demo's rows (--data FILE takes yours) · 1,600 samples" in ran(words)[2]
    assert "the demo's rows" not in ran([*words, "--data", str(place.rows)])[2]


@pytest.mark.parametrize("label", TYPED)
def test_a_dry_run_shows_the_plan_and_writes_nothing(place: Place, tmp_path: Path, label: str) -> None:
    code, printed, said = ran([*place.typed(label, tmp_path / "out", TWELVE), "--dry_run"])
    assert code == 0
    assert "12 steps" in said and next(line for line in said.splitlines() if line.startswith("method"))
    assert printed.count("---") == 2 and "«" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_run_where_a_run_is_shows_the_plan_and_says_what_would_be_refused(place: Place, tmp_path: Path) -> None:
    """Caught: refused itself, though it writes nothing; and a run's files touched."""
    out = tmp_path / "out"
    words = place.typed("lora", out, "--train.max_steps 1 --train.save_interval 1")
    assert ran(words)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    code, printed, said = ran([*words, "--dry_run"])
    assert code == 0 and printed.count("---") == 2
    assert f"warning: the run itself would be refused: {out}: holds a run already; --resume goes on with it" in said
    assert before and {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# ---- pro -------------------------------------------------------------------------------------------------------------


def test_pro_says_which_layers_are_new_and_how_each_fares(place: Place) -> None:
    """The header counts in the deeper model; metrics.csv has each new block's gradient and update, above 0 from the first step on.

    The update is what the files say; nothing else learns, so the squared gradients add up to the whole gradient's. Blocks 1 and 3 of the
    base are followed: layers 2 and 5 of 6.
    """
    out = place.path / "pro-each"
    code, _, said = ran(place.typed("pro", out, "--train.max_steps 4 --train.save_interval 1 --train.lr_warmup_steps 0"))
    assert code == 0
    assert "layers 2, 5 of 6 are new" in said
    rows = read(out / names.METRICS)[1:]
    assert {name for name in rows[0] if name.startswith("layer_")} == {
        f"layer_{n}_{what}_norm" for n in (2, 5) for what in ("grad", "update")
    }
    stored = [files_of(out / names.step_name(number)) for number in (1, 2, 3, 4)]
    for row, before, after in zip(rows[1:], stored, stored[1:], strict=False):
        for layer, prefix in ((2, "model.layers.1.inserted."), (5, "model.layers.3.inserted.")):
            moved = sum(float((after[name] - before[name]).double().square().sum()) for name in after if name.startswith(prefix))
            assert float(row[f"layer_{layer}_update_norm"]) == pytest.approx(math.sqrt(moved), rel=1e-4)
    for row in rows:
        assert all(float(value) > 0 for name, value in row.items() if name.startswith("layer_")), row
        assert math.hypot(*(float(row[f"layer_{n}_grad_norm"]) for n in (2, 5))) == pytest.approx(float(row["grad_norm"]), rel=1e-4)


def test_pro_on_an_expanded_base_trains_the_blocks_that_it_has(place: Place, tmp_path: Path) -> None:
    """DESIGN section 5: config.json names them; a step holds them alone."""
    base, out = make_base(tmp_path / "expanded", expanded=True), tmp_path / "out"
    code, _, said = ran(place.typed("pro --train.max_steps 3", out, base=base))
    assert code == 0
    assert "layer 2 of 4 is new" in said
    assert {name for name in read(out / names.METRICS)[0] if name.startswith("layer_")} == {"layer_2_grad_norm", "layer_2_update_norm"}
    before, after = load_file(base / names.WEIGHTS), files_of(out / "step-3")
    assert set(after) == {name for name in before if name.startswith("model.layers.2.")}
    assert all(not torch.equal(tensor, before[name].float()) for name, tensor in after.items())


def test_lora_before_a_zero_projection_is_named_and_stops_the_run(place: Place, tmp_path: Path) -> None:
    """DESIGN section 5: on q and v of an inserted block LoRA can never learn. Exit code 1, nothing committed."""
    base, out = make_base(tmp_path / "expanded", expanded=True), tmp_path / "out"
    shown = refused(place.typed("lora --lora.target_modules q_proj v_proj", out, TWELVE, base=base), code=1)
    assert shown.startswith("error: model.layers.2.self_attn.q_proj.adapter.lora_A, model.layers.2.self_attn.q_proj.adapter.lora_B, ")
    assert "no gradient after two updates" in shown
    assert not list_steps(out)


# ---- what is saved ---------------------------------------------------------------------------------------------------


def test_freeze_saves_the_trained_tensors_alone(place: Place) -> None:
    """A03, read from the file: `norm` is the last one, in fp32; each of them moved, and the end of the run says so (here: five)."""
    done, before = place.run("freeze"), load_file(place.base / names.WEIGHTS)
    after = files_of(done.step(12))
    mlp = [f"model.layers.3.mlp.{word}_proj.weight" for word in ("gate", "up", "down")]
    assert set(after) == {*mlp, "model.norm.weight", "lm_head.weight"}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = {name: float((tensor - before[name].float()).norm() / before[name].float().norm()) for name, tensor in after.items()}
    assert min(moved.values()) > 0.01
    line = next(line for line in done.said.splitlines() if line.startswith("moved"))
    for name, far in moved.items():
        assert f"{name.removesuffix('.weight')} {far:.2%}" in line


def test_what_did_not_move_is_said(place: Place, tmp_path: Path) -> None:
    """The end of a run of `full` in bf16: what is smaller than its rounding is lost in the file, and a warning names it."""
    code, _, said = ran(place.typed("full", tmp_path / "out", "--train.max_steps 2 --train.lr 1e-7"))
    assert code == 0
    assert "warning: " in said and "what was saved is what it was before" in said
    before, after = load_file(place.base / names.WEIGHTS), files_of(tmp_path / "out" / "step-2")
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert "model.norm.weight" in still and f" and {len(still) - 3} more: trained" in said


def test_a_step_of_full_is_a_plain_model_in_its_bases_dtype(place: Place) -> None:
    """DESIGN section 3: config.json is the base's; the newest two steps keep their training state, the older one is whole too."""
    done, before = place.run("full"), load_file(place.base / names.WEIGHTS)
    for number in (4, 8, 12):
        after = load_file(done.step(number) / names.WEIGHTS)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
        }
        assert (done.step(number) / names.CONFIG).read_bytes() == (place.base / names.CONFIG).read_bytes()
        assert not (done.step(number) / names.ADAPTER_CONFIG).exists()
        assert (
            (done.step(number) / names.TRAINING_STATE).exists() == (done.step(number) / names.TRAINING_STATE_META).exists() == (number > 4)
        )
    assert resolve(done.step(4)).is_model and resolve(done.step(4)).fingerprint() == fingerprint(resolve(done.step(4)).shards())
    masters = [name for name in load_file(done.step(12) / names.TRAINING_STATE) if name.startswith("exact/")]
    assert len(masters) == len(before)


def test_the_states_of_full_are_dropped_as_the_run_goes_on(place: Place, tmp_path: Path) -> None:
    """And only of `full`: every step of an adapter keeps its own."""
    out = Path(shutil.copytree(place.run("full").out, tmp_path / "out"))
    did(["finetune", "full", "--resume", "--out_dir", str(out), "--train.max_steps", "16"])
    kept = [step.number for step in list_steps(out) if (step.path / names.TRAINING_STATE).exists()]
    assert kept == [12, 16]
    assert all(step.is_whole for step in list_steps(out))
    assert all((place.run("pro").step(number) / names.TRAINING_STATE).exists() for number in (4, 8, 12))


def test_a_run_that_changed_nothing_or_too_much_commits_nothing(place: Place, tmp_path: Path) -> None:
    """Promise 12: exit code 1. A rate too small for fp32 to feel, and weights beyond what the base's fp16 holds."""
    shown = refused(place.typed("freeze", tmp_path / "still", "--train.max_steps 2 --train.lr 1e-30"), code=1)
    assert "no trained tensor differs from its start" in shown and not list_steps(tmp_path / "still")
    half = make_base(tmp_path / "half", dtype=torch.float16)
    words = "--train.max_steps 1 --train.lr 1e6 --train.lr_warmup_steps 0 --eval.fraction 0"
    shown = refused(place.typed("full", tmp_path / "large", words, base=half), code=1)
    assert "beyond what float16 holds" in shown and not list_steps(tmp_path / "large")


# ---- modules trained whole, and the head -----------------------------------------------------------------------------

HEADS = [  # what is typed, on which base, what moves of the two, whether the result is tied
    ("lora --lora.r 4 --lora.modules_to_save embed_tokens", "tied", {"embedding"}, True),
    ("lora --lora.r 4 --lora.modules_to_save lm_head", "tied", {"embedding"}, True),
    ("lora --lora.r 4 --lora.modules_to_save lm_head --lora.untie true", "tied", {"head"}, False),
    ("lora --lora.r 4 --lora.modules_to_save embed_tokens --lora.untie true", "tied", {"embedding"}, False),
    ("lora --lora.r 4 --lora.target_modules v_proj lm_head --lora.untie true", "tied", {"head"}, False),
    ("lora --lora.r 4 --lora.modules_to_save embed_tokens lm_head", "base", {"embedding", "head"}, False),
    ("lora --lora.r 4 --lora.modules_to_save embed_tokens", "base", {"embedding"}, False),
    ("pro --pro.n_insert 1 --pro.modules_to_save lm_head --pro.untie true", "tied", {"head"}, False),
    ("freeze --freeze.layers last:1 --freeze.extra_modules embed_tokens", "tied", {"embedding"}, True),
    ("full", "tied", {"embedding"}, True),
    ("full --full.untie true", "tied", {"embedding", "head"}, False),
]


@pytest.mark.parametrize(("words", "on", "moves", "stays_tied"), HEADS)
def test_a_shared_head_stays_shared_unless_it_is_untied(
    place: Place, tmp_path: Path, words: str, on: str, moves: set[str], stays_tied: bool
) -> None:
    """A04: what was trained moved, the other one did not; merged (or a step of `full`) and read by transformers it computes the step's
    logits, and config.json says whether the two are one. PEFT, where it knows the method, computes the same from the step itself.
    """
    from transformers import AutoModelForCausalLM

    base, out = getattr(place, on), tmp_path / "out"
    did(place.typed(words, out, "--train.max_steps 3 --eval.interval 0", base=base))
    step, merged = out / "step-3", tmp_path / "merged"
    if words.startswith("full"):
        merged = step
    else:
        did(["merge_lora", str(step), "--out_dir", str(merged), "--dtype", "float32"])
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert apart(tuned(step), theirs) <= 1e-5
    stored = load_file(merged / names.WEIGHTS)
    assert json.loads((merged / names.CONFIG).read_text())["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in stored) is not stays_tied
    before = load_file(base / names.WEIGHTS)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    found = {"embedding"} if not torch.equal(stored[embedding].float(), before[embedding].float()) else set()
    if not stays_tied and not torch.equal(stored[head].float(), before.get(head, before[embedding]).float()):
        found.add("head")
    assert found == moves
    if (step / names.ADAPTER_CONFIG).exists():
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert apart(tuned(step), PeftModel.from_pretrained(plain, str(step)).eval()) <= 1e-5


# ---- adapters at run time --------------------------------------------------------------------------------------------


def test_chat_switches_between_adapters_as_generate_adds_them(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several methods at once, with weights: `/adapter A:0.5 B:0.5` says what `generate --adapter A:0.5 --adapter B:0.5` does, the base is
    loaded once, and `/adapter off` is the base again.
    """
    from litlora.checkpoint import weights

    lora, freeze, series = (place.run(label).step(4) for label in ("lora", "freeze", "series"))
    loads: list[Path] = []
    real = weights.load_base
    monkeypatch.setattr(weights, "load_base", lambda base, *rest, **more: loads.append(base.path) or real(base, *rest, **more))
    mixes = [[f"{lora}:0.5", f"{series}:0.5"], [f"{freeze}:0.7", f"{series}:0.7"], [f"{series}:-1"], [str(lora)], []]
    asked = "Go on, go on"
    typed = "".join(f"/adapter {' '.join(mix) or 'off'}\n/clear\n{asked}\n" for mix in mixes)
    answers = did(["chat", str(place.base), *BRIEF], typed)
    assert loads == [place.base]
    each = []
    for mix in mixes:
        words = [word for adapter in mix for word in ("--adapter", adapter)]
        each.append(did(["generate", str(place.base), "--prompt", asked, *BRIEF, *words]))
    assert answers == "".join(each)
    assert len(set(each)) == len(mixes) and all(len(answer) > 8 for answer in each)


def test_what_cannot_be_weighted_is_refused_and_the_chat_goes_on(place: Place) -> None:
    """DoRA and new blocks go alone, with weight 1; after the refusal the model is as it was."""
    lora, dora, pro = (place.run(label).step(8) for label in ("lora", "dora", "pro"))
    for words in ([f"{dora}:0.5"], [str(dora), str(lora)], [f"{pro}:0.5"]):
        shown = refused(["generate", str(place.base), "--prompt", "x", *BRIEF, *(f"--adapter={word}" for word in words)])
        assert "merge" in shown
    one = did(["chat", str(lora), *BRIEF], "Go on\n")
    code, printed, said = ran(["chat", str(lora), *BRIEF], f"Go on\n/adapter {dora}:0.5\n/clear\nGo on\n")
    assert code == 1 and said.count("error: ") == 2 and "DoRA" in said  # the line's, and at the end how many were refused
    assert printed == 2 * one


def test_the_loaded_step_of_each_method_learns_nothing_by_itself(run: Ran) -> None:
    """What is put on for use is not trained by accident."""
    held = trainable(tuned(run.step(8)))
    assert not [name for name in held if any(slot in name for slot in (".adapter.", ".prompt.", ".inserted."))]


@pytest.mark.parametrize("command", ["finetune lora", "finetune full", "pretrain", "estimate lora"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--data", "demo", "nowhere.json:2"], "nowhere.json: there is no such file"),
        (["--eval.data", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--out_dir", "taken"], "taken: holds a run already"),
        (["--train.keep", "none"], "does not say what stays"),
    ],
)
def test_a_wrong_path_is_refused_before_torch_is_imported(command: str, words: list[str], said: str, tmp_path: Path) -> None:
    """Waiting seconds for an error is seconds too many. Caught: ten of them, and 240 MB, for a name mistyped."""
    if command.startswith("estimate") and words[0] in ("--out_dir", "--train.keep"):
        return  # writes nothing
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / names.RUN_YAML).write_text("seed: 1\n")
    code = "import sys\nfrom litlora.__main__ import main\ncode = main(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), *words], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
