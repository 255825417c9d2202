"""The MXFP4 codec, and the reader's own decoding, against third-party encoders bit for bit."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.safetensors_reader import SafetensorsFile
from mimo_jax.stored_weights import StoredWeight
from pallas_kernels import mxfp4
from tests.checkpoint_files import Tensor, write_folder
from tests.conftest import golden_folders, golden_id

CODECS = pytest.mark.parametrize("folder", golden_folders("mxfp4_codec"), ids=golden_id)


def golden(folder):
    file = SafetensorsFile(folder / "golden.safetensors")
    return {name: tensor.read() for name, tensor in file.tensors.items()}


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


def packed_rows(values):
    names = sorted({name.removesuffix(".packed") for name in values if name.endswith(".packed")} - {"all_codes"})
    assert len(names) >= 40
    for name in names:
        yield name, values[f"{name}.packed"], values[f"{name}.scale"], values[f"{name}.decoded"]


@CODECS
def test_decodes_what_every_encoder_wrote(folder):
    for name, codes, scales, expected in packed_rows(golden(folder)):
        got = np.asarray(mxfp4.decode(jnp.asarray(codes), jnp.asarray(scales)))
        normal = np.repeat(scales, 32, axis=-1) >= 2  # below, results are denormal and XLA may flush them
        np.testing.assert_array_equal(bits(got)[normal], bits(expected)[normal], err_msg=name)
        assert np.all((got == expected) | (got == 0)), name


@CODECS
def test_decodes_every_code_and_scale(folder):
    values = golden(folder)
    codes, scales, expected = (values[f"all_codes.{n}"] for n in ("packed", "scale", "decoded_f32"))
    sane = (scales >= 2).reshape(-1)
    got = np.asarray(mxfp4.decode(jnp.asarray(codes), jnp.asarray(scales)))
    np.testing.assert_array_equal(bits(got)[sane], bits(expected)[sane])
    exact = sane & (scales <= 252).reshape(-1)
    halved = np.asarray(mxfp4.decode(jnp.asarray(codes), jnp.asarray(scales), jnp.bfloat16))
    np.testing.assert_array_equal(halved.astype(np.float32)[exact], expected[exact])


@CODECS
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_reader_decodes_every_code_and_scale(folder, dtype, tmp_path):
    values = golden(folder)
    codes, scales, expected = (values[f"all_codes.{n}"] for n in ("packed", "scale", "decoded_f32"))
    tensors = {"w": Tensor.of("U8", codes), "w_scale": Tensor.of("U8", scales)}
    [file] = write_folder(tmp_path, {}, tensors).glob("*.safetensors")
    stored = SafetensorsFile(file).tensors
    weight = StoredWeight(stored["w"], expected.shape, "mxfp4", scales=(stored["w_scale"],))
    out = np.empty(expected.shape, dtype)
    weight.read_expanded(out, 0, len(out))
    np.testing.assert_array_equal(out.reshape(-1).view(np.uint8), expected.astype(dtype).reshape(-1).view(np.uint8))


@CODECS
def test_encodes_by_the_floor_rule(folder):
    values = golden(folder)
    cases = [name.removesuffix(".input") for name in values if name.endswith(".input")]
    assert {"ties", "edge", "normal"} <= set(cases)
    for case in cases:
        codes, scales = map(np.asarray, mxfp4.encode(jnp.asarray(values[f"{case}.input"])))
        expected = values[f"{case}.torchao_floor.packed"]
        np.testing.assert_array_equal(scales, values[f"{case}.torchao_floor.scale"], err_msg=case)
        compared = np.repeat(scales != 0, 16, axis=-1)  # torchao divides by 2**-126 where the scale is 2**-127
        assert compared.any()
        np.testing.assert_array_equal(codes[compared], expected[compared], err_msg=case)


def test_encode_refuses_cut_blocks():
    with pytest.raises(ValueError, match="multiple"):
        mxfp4.encode(jnp.zeros((2, 48)))
