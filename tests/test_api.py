"""The Python API: `from litlora import GPT, generate`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_samples import make_adapter
from talkers import make_step, make_talker

import litlora
from litlora import GPT, Config, generate, load
from litlora.errors import UserError
from litlora.methods.attach import linears

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("api") / "base")


@pytest.fixture(scope="module")
def step(base: Path) -> Path:
    return make_step(base.parent / "out", 200, base)


def test_the_names_are_there_without_torch() -> None:
    """C5: torch comes with the first model, not with the import."""
    code = "import sys, litlora; litlora.__version__, litlora.generate, litlora.load, litlora.Config; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert set(litlora.__all__) <= set(dir(litlora))
    assert Config is litlora.config.Config
    with pytest.raises(AttributeError, match="'litlora' has no attribute 'nothing'"):
        litlora.nothing  # noqa: B018


def test_the_version_is_the_packages() -> None:
    found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == litlora.__version__


def test_an_adapter_given_by_its_path_is_on_for_one_answer(base: Path, step: Path) -> None:
    """The answer is that of the step itself, and the model is the base again."""
    model = GPT.from_pretrained(base)
    plain = generate(model, "你好", max_new_tokens=20)
    tuned = generate(model, prompt="你好", adapter_path=step, max_new_tokens=20)
    assert tuned == generate(GPT.from_pretrained(step), "你好", max_new_tokens=20) != plain
    assert generate(model, "你好", max_new_tokens=20) == plain
    assert generate(model, "你好", adapter_path=step.parent, max_new_tokens=20) == tuned, "a run is as good as its best step"
    assert generate(model, "你好", adapter_path=step, adapter_weight=0.0, max_new_tokens=20) == plain


def test_the_adapter_comes_off_after_an_exception_too(base: Path, step: Path) -> None:
    """Mutation seen: adapters taken off after the answer, not in a finally."""
    model = GPT.from_pretrained(base).train()
    hook = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, "x", adapter_path=step, max_new_tokens=3)
    hook.remove()
    assert all(host.adapter is None for host in linears(model).values())
    assert model.training


def test_what_a_step_carries_stays_on_below_another_adapter(base: Path, step: Path) -> None:
    other = make_adapter(base.parent / "peft", str(base), seed=9)
    model = load(step)
    own = {name: host.adapter for name, host in linears(model).items()}
    both = generate(model, "x", adapter_path=other, adapter_weight=0.5, max_new_tokens=20)
    assert {name: host.adapter for name, host in linears(model).items()} == own
    assert both == generate(load(base, adapters={step: 1.0, other: 0.5}), "x", max_new_tokens=20)
    assert both not in {generate(model, "x", max_new_tokens=20), generate(model, "x", adapter_path=other, max_new_tokens=20)}


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """A02."""
    stranger = make_step(tmp_path / "out", 100, make_talker(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match="its weights are others"):
        generate(GPT.from_pretrained(base), "x", adapter_path=stranger)
    with pytest.raises(UserError, match="whole model, not an adapter"):
        generate(GPT.from_pretrained(base), "x", adapter_path=base)


def test_messages_and_a_system_prompt_are_prompts_too(base: Path) -> None:
    model = GPT.from_pretrained(base)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    assert generate(model, messages, max_new_tokens=9) == generate(model, "x", system="be brief", max_new_tokens=9)
    assert generate(model, "s:be brief<|end|>u:x<|end|>a:", raw=True, max_new_tokens=9) == generate(model, messages, max_new_tokens=9)


def test_sampling_is_the_callers_to_choose(base: Path) -> None:
    model = GPT.from_pretrained(base)
    one, two = (generate(model, "x", temperature=2.0, seed=seed, max_new_tokens=30) for seed in (1, 2))
    assert one != two
    assert generate(model, "x", temperature=2.0, seed=1, max_new_tokens=30) == one
    assert generate(model, "x", temperature=2.0, seed=1, max_new_tokens=30, stop=one[5:7]) == one[: one.index(one[5:7])]
    with pytest.raises(UserError, match="temperature"):
        generate(model, "x", temperature=-1.0)


def test_what_cannot_be_answered_is_refused(base: Path) -> None:
    model = GPT.from_pretrained(base)
    with pytest.raises(UserError, match="not loaded from a directory"):
        generate(GPT(model.config), "x")
    with pytest.raises(UserError, match="no room"):
        generate(model, "x" * 300)
    with pytest.raises(UserError, match="chat template"):
        generate(model, [{"role": "user", "content": "x"}], raw=True)


def test_a_dtype_is_the_callers_to_choose(base: Path) -> None:
    assert load(base, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
