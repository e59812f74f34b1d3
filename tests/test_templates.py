"""Several chat templates of one tokenizer: as transformers writes and reads them, and in what is made of a model."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_merge import ALL, make_base, make_step, merged, with_tokenizer
from test_prompts import TOOL, answer, byte_level, user

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.files import serving_files
from litlora.checkpoint.resolve import resolve
from litlora.checkpoint.tokenizers import tokenizer_files
from litlora.errors import UserError
from litlora.merge.expand import expand, prepare_expansion
from litlora.prompts import Prompts
from litlora.tokenizer import Tokenizer

TURN = "{% for m in messages %}{{ m.role + ':' + m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
NAMED = {"default": TURN, "tool_use": "{{ tools[0].function.name }}!" + TURN, "rag.v2": "{{ 'é' }}" + TURN}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tokenizer with several templates, as transformers writes one."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(byte_level(tmp_path / "first"))
    theirs.chat_template = dict(NAMED)
    theirs.save_pretrained(tmp_path / "saved")
    found = sorted(path.name for path in (tmp_path / "saved").rglob("*.jinja"))
    assert found == ["chat_template.jinja", "rag.v2.jinja", "tool_use.jinja"]
    return tmp_path / "saved"


def same_as_transformers(directory: Path, choices: dict[str | None, str]) -> None:
    """Prompts of both, for `--chat_template` CHOICE and their name for it, without tools and with one."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    for choice, name in choices.items():
        prompts = Prompts.chosen(Tokenizer(directory), choice)
        for tools in ([], [TOOL]):
            if choice is not None and tools:
                continue  # theirs takes a chosen one for tools too
            told = [{"role": "tools", "content": tools}] if tools else []
            expected = theirs.apply_chat_template(
                [user("q"), answer("a"), user("r")], tools=tools or None, chat_template=name, add_generation_prompt=True, return_dict=False
            )
            assert prompts.prompt_ids([*told, user("q"), answer("a"), user("r")]) == expected, (choice, tools)


def test_templates_in_a_folder_of_their_own_are_those_of_transformers(saved: Path) -> None:
    """additional_chat_templates/NAME.jinja beside chat_template.jinja; where there are files, the list of an older
    tokenizer_config.json is out of use: of it, a name alone can be asked for. Caught: tools shown by that list's; its names unknown."""
    same_as_transformers(saved, {None: None, "default": "default", "rag.v2": "rag.v2"})
    assert Prompts.chosen(Tokenizer(saved), "rag.v2").template_name == "rag.v2, of the tokenizer"
    (saved / "additional_chat_templates" / "tool_use.jinja").unlink()
    path = saved / "tokenizer_config.json"
    older = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": older}))
    same_as_transformers(saved, {None: None, "rag.v2": "rag.v2"})
    assert Prompts.chosen(Tokenizer(saved), "tool_use").template == "{{ 2 }}"
    (saved / "additional_chat_templates" / "rag.v2.jinja").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="not UTF-8") as caught:
        Prompts(Tokenizer(saved))
    assert caught.value.where.endswith("rag.v2.jinja")


def test_of_two_defaults_the_one_in_the_folder_is_that_of_transformers(saved: Path, tmp_path: Path) -> None:
    """additional_chat_templates/default.jinja before chat_template.jinja, also in what is made of the model; but a link to nothing is
    passed over. Caught: chat_template.jinja before it; a link to nothing in place of it, and refused."""
    other = saved / names.ADDITIONAL_TEMPLATES / "default.jinja"
    other.write_text("{{ 'other' }}" + TURN)
    same_as_transformers(saved, {None: None, "default": "default"})
    assert Prompts(Tokenizer(saved)).template == other.read_text()
    flat = tmp_path / "flat"
    shutil.copytree(saved, flat, ignore=shutil.ignore_patterns("*.jinja", names.ADDITIONAL_TEMPLATES))
    for name, data in tokenizer_files(saved).items():
        (flat / name).write_bytes(data)
    same_as_transformers(flat, {None: None, "default": "default"})
    assert Prompts(Tokenizer(flat)).template == other.read_text()
    other.unlink()
    other.symlink_to("nowhere")
    same_as_transformers(saved, {None: None, "default": "default"})
    assert Prompts(Tokenizer(saved)).template == TURN
    listed = json.loads(tokenizer_files(saved)[names.TOKENIZER_CONFIG])["chat_template"]
    assert {entry["name"]: entry["template"] for entry in listed} == NAMED


@pytest.mark.parametrize("listed", [None, "{{ 1 }}", [{"name": "default", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]])
def test_without_a_default_among_the_files_none_is_in_use_as_in_transformers(saved: Path, listed: object) -> None:
    """additional_chat_templates/tool_use.jinja alone: an older list's default is out of use, unless it is asked for by its name.

    Caught: that list's default, which transformers would not train or serve with; the only one there is, which is for tools.
    """
    from transformers import AutoTokenizer

    for name in ("chat_template.jinja", "additional_chat_templates/rag.v2.jinja"):
        (saved / name).unlink()
    path = saved / names.TOKENIZER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"chat_template": listed} if listed else {})))
    with pytest.raises(ValueError, match="no default"):
        AutoTokenizer.from_pretrained(saved).apply_chat_template([user("q")])
    with pytest.raises(UserError, match=r"has chat templates \(tool_use\), none of them named default") as caught:
        Prompts(Tokenizer(saved))
    known = [name for name in ("default", "rag", "tool_use") if name in caught.value.hint]
    assert known == (
        ["tool_use"] if listed is None else ["default", "tool_use"] if isinstance(listed, str) else ["default", "rag", "tool_use"]
    )
    if listed:
        assert Prompts.chosen(Tokenizer(saved), "default").template == "{{ 1 }}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja", "--chat_template"])
def test_a_template_behind_a_link_is_no_longer_than_other_small_files(name: str, tmp_path: Path) -> None:
    """64 MiB. Caught: a file of any size read into memory, wherever the link leads."""
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 64 * 2**20 + 1)
    model = byte_level(tmp_path / "model")
    path = large if name.startswith("--") else model / name
    if path != large:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(large)
    with pytest.raises(UserError, match="has 67,108,865 bytes; at most 67,108,864 are read") as caught:
        Prompts.chosen(Tokenizer(model), str(large) if path == large else None)
    assert caught.value.where == (f"{name} {large}" if path == large else str(path))


def test_templates_in_the_cache_of_the_hub_are_links_that_are_followed(saved: Path, tmp_path: Path) -> None:
    """S04: models--org--name/snapshots/HASH/additional_chat_templates/file -> ../../../blobs/HASH, and no link beyond that. Caught: the
    folder taken for a directory of its own, of which each template is a link out of it."""
    model = tmp_path / "models--org--name"
    shutil.copytree(saved, model / "snapshots" / "abc123")
    (model / "blobs").mkdir()
    path = model / "snapshots" / "abc123" / names.ADDITIONAL_TEMPLATES / "tool_use.jinja"
    path.rename(model / "blobs" / "f00")
    path.symlink_to("../../../blobs/f00")
    files = tokenizer_files(model / "snapshots" / "abc123")
    listed = {entry["name"]: entry["template"] for entry in json.loads(files[names.TOKENIZER_CONFIG])["chat_template"]}
    assert listed == NAMED
    (model / "blobs" / "f00").rename(tmp_path / "elsewhere")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link out of its directory"):
        tokenizer_files(model / "snapshots" / "abc123")


@pytest.mark.parametrize("choice", [None, "rag.v2"])
def test_a_step_carries_the_templates_that_it_was_trained_with(saved: Path, tmp_path: Path, choice: str | None) -> None:
    """And it is flat: with a template for tools, all stand in tokenizer_config.json, and there is no chat_template.jinja, beside which
    transformers would not look there. Caught: one written all the same; the folder left behind."""
    prompts = Prompts.chosen(Tokenizer(saved), choice)
    step = tmp_path / "step"
    step.mkdir()
    for name, data in serving_files(saved, prompts.template, prompts.tool_template).items():
        (step / name).write_bytes(data)
    again = Prompts(Tokenizer(step))
    assert (again.template, again.tool_template) == (prompts.template, prompts.tool_template)
    same_as_transformers(step, {None: None})
    assert Prompts.chosen(Tokenizer(step), "rag.v2").template == NAMED["rag.v2"]  # by its name still
    assert Prompts.chosen(Tokenizer(step), "default").template == prompts.template
    assert (step / "chat_template.jinja").exists() == (choice is not None)


@pytest.mark.parametrize("way", ["merge", "merge of a step with a tokenizer", "merge of a step with templates alone", "expand", "convert"])
def test_templates_of_a_folder_go_with_a_new_model(way: str, tmp_path: Path) -> None:
    """chat_template.jinja and additional_chat_templates/: transformers has them all in what is made of the base. Caught: the folder left
    behind in `template_files`; chat_template.jinja beside the list; a step's list not looked at; the base's template before a step's."""
    transformers = pytest.importorskip("transformers")
    base = with_tokenizer(make_base(tmp_path / "base", eos_token_id=2, pad_token_id=2, bos_token_id=1))
    named = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}
    (base / names.CHAT_TEMPLATE).write_text(named["default"])
    (base / names.ADDITIONAL_TEMPLATES).mkdir()
    for name in ("tool_use", "rag"):
        (base / names.ADDITIONAL_TEMPLATES / f"{name}.jinja").write_text(named[name])
    assert transformers.AutoTokenizer.from_pretrained(base).chat_template == named
    out = tmp_path / "out"
    if way == "expand":
        expand(prepare_expansion(resolve(base), out, 1))
    elif way == "convert":
        assert main(["convert", str(base), "--to", "hf", "--dtype", "float16", "--out_dir", str(out)]) == 0
    else:
        files = serving_files(base, named["default"], named["tool_use"]) if way != "merge" else {}
        if "alone" in way:
            del files[names.TOKENIZER]
        step = make_step(tmp_path / "run", base, files=files, **ALL)
        if files:
            (base / names.CHAT_TEMPLATE).write_text("another, later")
            shutil.rmtree(base / names.ADDITIONAL_TEMPLATES)
        merged(step, out)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == named
    assert all(path.is_file() for path in out.iterdir())
