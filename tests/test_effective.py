"""The plain model that a checkpoint means, without writing it: the exact values of every method, and what a merge rounds. Oracle: fp64."""

from pathlib import Path

import checkpoint_samples as samples
import numpy as np
import pytest
from test_merge import make_base, make_step, merged, read
from test_merge_methods import CASES, case, exact, step_of, tuning_of

from litlora.checkpoint.checkpoint import Checkpoint
from litlora.checkpoint.resolve import resolve
from litlora.errors import UserError
from litlora.families import expected_tensors, tensor_name
from litlora.merge.effective import Effective
from litlora.methods.tuning import EMBEDDING, HEAD, merged_config
from litlora.options import AdapterOptions
from litlora.safetensors_file import from_float32, to_float32


def plain(directory: Path) -> dict[str, tuple[str, np.ndarray, bytes]]:
    """What the files of a whole model hold, under full names."""
    return {tensor_name(name): values for name, values in read(directory).items()}


@pytest.mark.parametrize("name", list(CASES))
def test_every_tensor_is_what_the_method_means(tmp_path: Path, name: str) -> None:
    """N04, before the rounding: in fp32 within the error of its products, in fp64 to a millionth of that.
    (Seen to fail: DoRA without its lengths.)"""
    base, step = case(tmp_path, name, "BF16")
    checkpoint = resolve(step)
    expected = exact(step, base)
    with Effective(checkpoint) as model:
        assert list(model.shapes) == list(expected_tensors(merged_config(checkpoint.tuning(), checkpoint.config())))
        for parameter, shape in model.shapes.items():
            value, error = expected[parameter]
            single, double = model.read(parameter), model.read(parameter, np.float64)
            assert single.shape == double.shape == shape == value.shape and (single.dtype, double.dtype) == (np.float32, np.float64)
            assert np.all(np.abs(single - value) <= error + 2.0**-24 * np.abs(value))
            assert np.allclose(double, value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", list(CASES))
def test_rounded_it_is_the_merged_model_to_the_byte(tmp_path: Path, name: str) -> None:
    _, step = case(tmp_path, name, "BF16")
    written = plain(merged(step, tmp_path / "merged"))
    with Effective(resolve(step)) as model, Effective(resolve(tmp_path / "merged")) as again:
        assert model.shapes == again.shapes and model.dtypes == again.dtypes
        for parameter, dtype in model.dtypes.items():
            assert from_float32(model.read(parameter), dtype) == written[parameter][2]
            assert np.array_equal(again.read(parameter), written[parameter][1])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_whole_model_is_read_as_it_is_stored(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype, shards=3)
    with Effective(resolve(base)) as model:
        for name, (stored, values, raw) in read(base).items():
            assert model.dtypes[name] == stored == dtype
            assert np.array_equal(model.read(name), to_float32(raw, dtype, values.shape)) and np.array_equal(
                model.read(name, np.float64), values
            )


def test_rows_come_in_blocks_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one piece holds, whatever the size of the blocks: here two groups of eight rows, so that the last one is a short one."""
    base = make_base(tmp_path / "base")
    step = make_step(tmp_path / "run", base, use_dora=True)
    with Effective(resolve(step)) as model:
        whole = {name: model.read(name) for name in model.shapes}
        monkeypatch.setattr("litlora.merge.tensors.BLOCK", 16 * 24)
        monkeypatch.setattr("litlora.merge.effective.BLOCK", 16 * 24)
        pieces = {name: [block.copy() for block in model.blocks(name)] for name in model.shapes}
    assert len(pieces["model.layers.0.self_attn.q_proj.weight"]) == 2  # of 30 rows
    for name, blocks in pieces.items():
        assert np.allclose(np.concatenate(blocks), whole[name], rtol=1e-6)


def test_a_head_that_is_the_embedding_is_there_once(tmp_path: Path) -> None:
    """Also where a file holds a copy of it."""
    tensors = dict(samples.base_tensors(tie_word_embeddings=True))
    tensors[HEAD] = tensors[EMBEDDING]
    base = samples.make_base(tmp_path / "base", tensors=tensors, tie_word_embeddings=True)
    with Effective(resolve(base)) as model:
        assert HEAD not in model.shapes and EMBEDDING in model.shapes


def test_what_no_plain_model_computes_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for kind, why in (("series", "a bottleneck with an activation"), ("prompt", "a learnt prompt")):
        options = AdapterOptions(kind=kind)
        shapes = tuning_of(options, base).file_shapes(Checkpoint(base, "base").config())
        tensors = {name: ("F32", shape, np.zeros(shape, np.float32)) for name, shape in shapes.items()}
        step = step_of(tmp_path / kind, base, options, tensors)
        with pytest.raises(UserError, match=why):
            Effective(resolve(step))


def test_an_adapter_that_does_nothing_is_its_base(tmp_path: Path) -> None:
    """Unlike a merge, which refuses it."""
    base = make_base(tmp_path / "base", "BF16")
    zero = {
        name: (dtype, shape, np.asarray(raw) * np.float32("lora_A" in name))
        for name, (dtype, shape, raw) in samples.adapter_tensors().items()
    }
    checkpoint = resolve(make_step(tmp_path / "run", base, tensors=zero))
    with Effective(checkpoint) as model:
        for name, (_, values, _) in read(base).items():
            assert np.array_equal(model.read(name), values)
