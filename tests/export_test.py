"""A packed run goes to disk and back bit for bit, and its export says what it computes, or is refused."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors

from moelab import config as configs
from moelab.errors import ConfigError
from moelab.quant import export, export_tensors, storage, tensor_file
from pallas_kernels import formats
from pallas_kernels.grouped_matmul import loading
from tests import packed_run, tiny

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
EXPERTS, WIDTH, HIDDEN = 4, 32, 32
SPARSE = (1, 2)  # layers with experts
AMAX = {
    layer: {
        role: np.arange(1, EXPERTS + 1, dtype=np.float32) * (layer + scale)
        for role, scale in (("gate_up", 0.5), ("down", 0.25))
    }
    for layer in SPARSE
}


@pytest.fixture(scope="module")
def nvfp4():
    return packed_run.make("nvfp4")


@pytest.fixture(scope="module")
def mxfp4():
    return packed_run.make("mxfp4")


def same(a, b):
    """Whether two trees have the same leaves, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    return True


def header_and_data(path):
    """Reads a safetensors file by hand: 8 bytes of header length, the JSON header, the data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), len(content) - 8 - length


class TestTensorFile:
    ARRAYS = {
        "a/scalar": np.array(1.5, np.float32),
        "b": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "c": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(16, 16),
        "d": np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],  # not contiguous
        "e": np.zeros((0, 4), np.uint8),
    }

    def test_gives_back_what_was_saved(self, tmp_path):
        tensor_file.save(tmp_path / "x", self.ARRAYS, {"format": "pt"})
        assert same(tensor_file.load(tmp_path / "x"), self.ARRAYS)
        header, _ = header_and_data(tmp_path / "x")
        assert header["__metadata__"] == {"format": "pt"}
        assert [header[name]["dtype"] for name in "bcd"] == ["BF16", "F8_E4M3", "I32"]

    def test_leaves_nothing_else_behind(self, tmp_path):
        tensor_file.save(tmp_path / "x", self.ARRAYS)
        assert [path.name for path in tmp_path.iterdir()] == ["x"]

    def test_refuses_other_dtypes(self, tmp_path):
        with pytest.raises(tensor_file.TensorFileError, match="wide is float64"):
            tensor_file.save(tmp_path / "x", {"wide": np.zeros(2)})

    @pytest.mark.parametrize("content", [None, b"", b"\xff" * 64])
    def test_refuses_what_it_cannot_read(self, tmp_path, content):
        if content is not None:
            (tmp_path / "x").write_bytes(content)
        with pytest.raises(tensor_file.TensorFileError, match="x cannot be read"):
            tensor_file.load(tmp_path / "x")


class TestStorage:
    @pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "nvfp4_46", "fp8_channel", "int4_group"])
    def test_round_trip_is_bit_identical(self, tmp_path, format):
        _, _, _, packed = packed_run.make(format)
        storage.save(tmp_path / "q", packed)
        found = storage.load(tmp_path / "q")
        assert same(found.rest, packed.rest)
        assert same(found.quantized, packed.quantized)  # formats and rules are in the structure
        assert same(found.router_state, packed.router_state)
        assert found.facts["config"] == packed.facts["config"]

    def test_experts_arranged_for_a_device_are_stored_as_they_were(self, tmp_path, nvfp4):
        _, _, _, packed = nvfp4

        def arranged(leaf):
            *_, outputs, inputs = leaf.shape
            return loading.padded(formats.arranged(leaf, "tcgen05"), 2 * outputs, 2 * inputs, 2)

        is_packed = dict(is_leaf=lambda a: isinstance(a, formats.BlockScaled))
        changed = jax.tree.map(arranged, packed.quantized, **is_packed)
        facts = storage.save(tmp_path / "q", dataclasses.replace(packed, quantized=changed))
        assert same(storage.load(tmp_path / "q").quantized, packed.quantized)
        assert facts["bytes"] == storage.save(tmp_path / "p", packed)["bytes"]

    def test_bfloat16_rounds_the_rest_alone(self, tmp_path, nvfp4):
        _, _, _, packed = nvfp4
        storage.save(tmp_path / "q", packed, "bfloat16")
        found = storage.load(tmp_path / "q")
        assert same(found.rest, jax.tree.map(lambda a: a.astype(jnp.bfloat16), packed.rest))
        assert same(found.quantized, packed.quantized)
        assert same(found.router_state, packed.router_state)

    def test_the_loaded_run_computes_the_same(self, tmp_path, nvfp4):
        _, model, _, packed = nvfp4
        storage.save(tmp_path / "q", packed)
        loaded = storage.load(tmp_path / "q")
        inputs = tiny.make_inputs()

        @jax.jit
        def hidden(run_params, quantized, router_state):
            variables = {"params": run_params, "quantized": quantized, "router_state": router_state}
            return model.apply(variables, inputs).hidden_BLD

        before = hidden(packed.rest, packed.quantized, packed.router_state)
        after = hidden(loaded.rest, loaded.quantized, loaded.router_state)
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()

    @pytest.mark.parametrize(("format", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
    @pytest.mark.parametrize("rest_dtype", ["float32", "bfloat16"])
    def test_bytes_on_disk_are_those_of_the_formats(self, tmp_path, format, bits, rest_dtype):
        _, _, variables, packed = packed_run.make(format)
        facts = storage.save(tmp_path / "q", packed, rest_dtype)
        header, data = header_and_data(tmp_path / "q" / storage.TENSORS)
        weights = len(SPARSE) * EXPERTS * (2 * HIDDEN * WIDTH + WIDTH * HIDDEN)
        matrices = len(SPARSE) * EXPERTS * 2
        global_scales = 4 * matrices if format == "nvfp4" else 0
        total = sum(a.size for a in jax.tree.leaves(variables["params"]))
        rest = (total - weights) * {"float32": 4, "bfloat16": 2}[rest_dtype]
        state = sum(a.nbytes for a in jax.tree.leaves(packed.router_state))
        assert data == weights * bits / 8 + global_scales + rest + state
        counted = facts["bytes"]
        assert counted["total"] == data == sum(counted["roles"].values())
        assert counted["file"] == (tmp_path / "q" / storage.TENSORS).stat().st_size
        assert (counted["bits_per_weight"], counted["quantized_weights"]) == (bits, weights)
        assert counted["global_scales"] == global_scales
        experts = counted["roles"]["expert_gate_up"] + counted["roles"]["expert_down"]
        assert experts == weights * bits / 8 + global_scales
        assert "other" not in counted["roles"]

    def test_bytes_of_each_role_by_hand(self, tmp_path, mxfp4):
        roles = storage.save(tmp_path / "q", mxfp4[3])["bytes"]["roles"]
        # width 32, 2 query heads and 1 key-value head of 16, 3 layers, 1 of them dense of width 64, 4 experts
        per_attention = 32 * 32 + 16 * 32 + 16 * 32 + 32 * 32
        assert roles["attention"] == 3 * per_attention * 4
        assert roles["norms"] == 7 * 32 * 4
        assert roles["router"] == 2 * (32 * 4 + 4) * 4  # the kernels and the biases
        assert roles["shared"] == 2 * 3 * 32 * 32 * 4
        assert roles["dense"] == 3 * 64 * 32 * 4
        assert roles["embedding"] == roles["head"] == 257 * 32 * 4

    def test_facts_say_how_it_was_made(self, tmp_path, nvfp4):
        facts = storage.save(tmp_path / "q", nvfp4[3])
        read = json.loads((tmp_path / "q" / storage.FACTS).read_text())
        assert read == json.loads(json.dumps(facts)) == storage.load(tmp_path / "q").facts
        assert read["order_of_operations"]["version"] == 1
        assert read["packages"]["jax"] == jax.__version__
        assert {tuple(spec.values()) for spec in read["blocks"].values()} == {("nvfp4", "amax")}

    def test_empty_folders_of_parameters_come_back(self, tmp_path, nvfp4):
        packed = nvfp4[3]
        rest = packed.rest | {"router": {}}  # a router without parameters
        storage.save(tmp_path / "q", dataclasses.replace(packed, rest=rest))
        assert storage.load(tmp_path / "q").rest["router"] == {}

    def test_refuses_a_folder_that_is_not_empty(self, tmp_path, nvfp4):
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "note").write_text("mine")
        with pytest.raises(ConfigError, match="q is there already and is not empty"):
            storage.save(tmp_path / "q", nvfp4[3])
        assert (tmp_path / "q" / "note").read_text() == "mine"

    def test_refuses_an_unknown_dtype(self, tmp_path, nvfp4):
        with pytest.raises(ConfigError, match="rest_dtype='fp8' is not known"):
            storage.save(tmp_path / "q", nvfp4[3], "fp8")
        assert not (tmp_path / "q").exists()

    def test_notices_a_changed_file(self, tmp_path, nvfp4):
        storage.save(tmp_path / "q", nvfp4[3])
        path = tmp_path / "q" / storage.TENSORS
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            ConfigError, match="is not the file that quantized.json was written for"
        ):
            storage.load(tmp_path / "q")

    def test_says_what_is_no_quantized_run(self, tmp_path):
        with pytest.raises(ConfigError, match="holds no quantized run"):
            storage.load(tmp_path)


def decoded(found, linear):
    """A Linear's weight by the contract of compressed-tensors, in numpy alone."""
    packed = found[f"{linear}.weight_packed"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    scale = found[f"{linear}.weight_scale"]
    if scale.dtype == np.uint8:
        scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
        block, divisor = 32, np.float32(1)
    else:
        scale, block = scale.astype(np.float32), 16
        divisor = found[f"{linear}.weight_global_scale"][0]
    return E2M1[codes] * np.repeat(scale, block, axis=1) / divisor


def exported(folder):
    """All tensors of a folder by safetensors' own parser, without moelab's reader."""
    found = {}
    for name, tensor in safetensors.deserialize((folder / export.TENSORS).read_bytes()):
        dtype = {
            "F8_E4M3": ml_dtypes.float8_e4m3fn,
            "BF16": ml_dtypes.bfloat16,
            "U8": np.uint8,
            "F32": np.float32,
        }[tensor["dtype"]]
        found[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return found


class TestExport:
    @pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d", "nvfp4_46", "mxfp4"])
    def test_codes_and_scales_decode_to_the_run_s_weights(self, tmp_path, format):
        _, _, _, packed = packed_run.make(format)
        layout = f"{format[:5]}-pack-quantized"
        export.export(tmp_path / "e", packed, layout)
        found = exported(tmp_path / "e")
        for role, names in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            wanted = np.asarray(formats.dequantize(packed_run.experts(packed)[role]))
            for s, layer in enumerate(SPARSE):
                for e in range(EXPERTS):
                    prefix = f"model.layers.{layer}.mlp.experts.{e}"
                    parts = [decoded(found, f"{prefix}.{name}") for name in names]
                    got = np.concatenate(parts)
                    # MXFP4 is exact; an NVFP4 global scale is stored as its reciprocal, rounded.
                    rtol = 0 if format == "mxfp4" else 4e-7
                    np.testing.assert_allclose(got, wanted[s, e], rtol=rtol)

    def test_bytes_are_those_of_the_packed_run(self, tmp_path, nvfp4):
        packed = nvfp4[3]
        export.export(tmp_path / "e", packed, "nvfp4-pack-quantized")
        found, gate_up = exported(tmp_path / "e"), packed_run.experts(packed)["gate_up"]
        linear = "model.layers.2.mlp.experts.3.up_proj"
        codes = np.asarray(gate_up.codes)[1, 3, HIDDEN:]
        assert found[f"{linear}.weight_packed"].tobytes() == codes.tobytes()
        scales = np.asarray(gate_up.scales)[1, 3, HIDDEN:]
        assert found[f"{linear}.weight_scale"].tobytes() == scales.tobytes()
        amax = np.asarray(gate_up.global_amax)[1, 3]
        assert found[f"{linear}.weight_global_scale"] == np.float32(2688) / amax

    def test_names_shapes_and_dtypes(self, tmp_path, nvfp4):
        done = export.export(
            tmp_path / "e",
            nvfp4[3],
            "nvfp4-pack-quantized",
            activations=True,
            input_amax=AMAX,
        )
        found = exported(tmp_path / "e")
        linear = "model.layers.1.mlp.experts.0.down_proj"
        leaves = {n.rpartition(".")[2]: found[n] for n in found if n.startswith(f"{linear}.")}
        assert {n: (a.shape, a.dtype.name) for n, a in leaves.items()} == {
            "weight_packed": ((32, 16), "uint8"),
            "weight_scale": ((32, 2), "float8_e4m3fn"),
            "weight_global_scale": ((1,), "float32"),
            "input_global_scale": ((1,), "float32"),
        }
        around = {n.removeprefix("model.layers.1."): found[n] for n in found if ".1." in n}
        around = {n: a for n, a in around.items() if ".experts." not in n}
        assert {n: a.shape for n, a in around.items()} == {
            "input_layernorm.weight": (32,),
            "post_attention_layernorm.weight": (32,),
            "self_attn.q_proj.weight": (32, 32),
            "self_attn.k_proj.weight": (16, 32),
            "self_attn.v_proj.weight": (16, 32),
            "self_attn.o_proj.weight": (32, 32),
            "mlp.gate.weight": (4, 32),
            "mlp.gate.e_score_correction_bias": (4,),
            "mlp.shared_experts.gate_proj.weight": (32, 32),
            "mlp.shared_experts.up_proj.weight": (32, 32),
            "mlp.shared_experts.down_proj.weight": (32, 32),
        }
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < set(found)
        assert found["model.layers.0.mlp.gate_proj.weight"].shape == (64, 32)
        assert done["experts"] == len(SPARSE) * EXPERTS
        assert done["tensors"] == len(found)
        assert done["tensor_bytes"] == sum(a.nbytes for a in found.values())

    def test_what_is_not_quantized_is_the_run_s_in_bfloat16(self, tmp_path, nvfp4):
        packed = nvfp4[3]
        export.export(tmp_path / "e", packed, "nvfp4-pack-quantized")
        found = exported(tmp_path / "e")
        sparse = packed.rest["segment_1"]["block_0"]
        pairs = {
            "model.layers.2.mlp.gate.weight": sparse["moe"]["router"]["kernel"][1].T,
            "model.layers.2.self_attn.o_proj.weight": sparse["attention"]["output"][1],
            "model.layers.1.self_attn.k_proj.weight": sparse["attention"]["key"][0],
            "model.layers.2.mlp.shared_experts.up_proj.weight": sparse["moe"]["shared"]["gate_up"][
                1, HIDDEN:
            ],
            "model.layers.0.mlp.down_proj.weight": packed.rest["segment_0"]["block_0"]["dense"][
                "down"
            ][0],
            "lm_head.weight": packed.rest["head"],
            "model.embed_tokens.weight": packed.rest["embedding"],
        }
        for name, value in pairs.items():
            wanted = np.asarray(value).astype(ml_dtypes.bfloat16)
            assert found[name].tobytes() == wanted.tobytes(), name
        bias = found["model.layers.2.mlp.gate.e_score_correction_bias"]
        # made up by packed_run: 0.25 times the number of the element over both layers
        np.testing.assert_array_equal(bias, 0.25 * np.arange(4, 8, dtype=np.float32))

    def test_a_tied_head_is_not_written_twice(self, tmp_path):
        _, _, _, packed = packed_run.make("mxfp4", model=dict(tied_head=True))
        export.export(tmp_path / "e", packed, "mxfp4-pack-quantized")
        assert "lm_head.weight" not in exported(tmp_path / "e")
        described = json.loads((tmp_path / "e" / "config.json").read_text())
        assert described["tie_word_embeddings"] is True

    def test_input_scales_are_those_of_the_calibration(self, tmp_path, nvfp4):
        export.export(
            tmp_path / "e", nvfp4[3], "nvfp4-pack-quantized", activations=True, input_amax=AMAX
        )
        found = exported(tmp_path / "e")
        prefix = "model.layers.2.mlp.experts.3"
        # expert 3: amax 4 * (2 + 0.5) = 10 into gate and up, 4 * (2 + 0.25) = 9 into down
        for name, amax in (("gate_proj", 10), ("up_proj", 10), ("down_proj", 9)):
            scale = found[f"{prefix}.{name}.input_global_scale"]
            np.testing.assert_array_equal(scale, np.float32(2688) / np.float32(amax))

    def test_weight_only_has_no_input_scales(self, tmp_path, nvfp4):
        export.export(tmp_path / "e", nvfp4[3], "nvfp4-pack-quantized", input_amax=AMAX)
        assert not [n for n in exported(tmp_path / "e") if n.endswith("input_global_scale")]
        config = json.loads((tmp_path / "e" / "config.json").read_text())
        assert (
            config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
        )

    def test_mxfp4_has_no_global_scales(self, tmp_path, mxfp4):
        export.export(tmp_path / "e", mxfp4[3], "mxfp4-pack-quantized", activations=True)
        found = exported(tmp_path / "e")
        assert not [n for n in found if n.endswith("global_scale")]
        assert found["model.layers.1.mlp.experts.0.gate_proj.weight_scale"].shape == (32, 1)

    def test_config_describes_the_model(self, tmp_path, nvfp4):
        export.export(
            tmp_path / "e", nvfp4[3], "nvfp4-pack-quantized", activations=True, input_amax=AMAX
        )
        config = json.loads((tmp_path / "e" / "config.json").read_text())
        assert config["architectures"] == ["MoelabForCausalLM"]
        assert config["embedding_multiplier"] == pytest.approx(32**0.5, rel=1e-15)
        assert (config["hidden_size"], config["moe_intermediate_size"]) == (32, 32)
        assert (config["num_experts"], config["num_experts_per_tok"]) == (4, 2)
        assert (config["mlp_only_layers"], config["num_hidden_layers"]) == ([0], 3)
        quantization = config["quantization_config"]
        group = quantization["config_groups"]["group_0"]
        assert quantization["quant_method"] == "compressed-tensors"
        assert group["weights"] == {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
            "dynamic": False,
        }
        assert group["input_activations"]["dynamic"] == "local"
        assert "lm_head" in quantization["ignore"]

    def test_a_layer_in_high_precision_stays_plain(self, tmp_path):
        # the two sparse layers in segments of their own: the first keeps its experts
        _, _, variables, packed = packed_run.make(
            "nvfp4", quantization=dict(recipe="nvfp4_qat", last_layers=1)
        )
        kept = dict(packed.quantized)
        assert sorted(kept) == ["segment_1", "segment_2"]
        del kept["segment_2"]
        rest = packed.rest | {"segment_2": variables["params"]["segment_2"]}
        packed = dataclasses.replace(packed, rest=rest, quantized=kept)
        done = export.export(tmp_path / "e", packed, "nvfp4-pack-quantized")
        found = exported(tmp_path / "e")
        assert done["experts"] == 2 * EXPERTS
        down = variables["params"]["segment_2"]["block_0"]["moe"]["experts"]["down"][0, 3]
        wanted = np.asarray(down).astype(ml_dtypes.bfloat16)
        weight = found["model.layers.2.mlp.experts.3.down_proj.weight"]
        assert weight.tobytes() == wanted.tobytes()
        assert "model.layers.1.mlp.experts.3.down_proj.weight_packed" in found

    def test_index_lists_every_tensor(self, tmp_path, nvfp4):
        export.export(tmp_path / "e", nvfp4[3], "nvfp4-pack-quantized")
        index = json.loads((tmp_path / "e" / export.INDEX).read_text())
        found = exported(tmp_path / "e")
        assert set(index["weight_map"]) == set(found)
        assert set(index["weight_map"].values()) == {export.TENSORS}
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in found.values())
        header, _ = header_and_data(tmp_path / "e" / export.TENSORS)
        assert header["__metadata__"] == {"format": "pt"}

    def test_a_stored_run_exports_the_same(self, tmp_path, nvfp4):
        storage.save(tmp_path / "q", nvfp4[3])
        for name, packed in (("a", nvfp4[3]), ("b", storage.load(tmp_path / "q"))):
            export.export(tmp_path / name, packed, "nvfp4-pack-quantized")
        assert same(exported(tmp_path / "a"), exported(tmp_path / "b"))

    def test_a_matrix_of_zeros_decodes_to_zeros(self):
        assert export_tensors.global_scale(np.float32(0), 448.0) == 1
        assert export_tensors.global_scale(np.float32(1e-38), 448.0) == np.finfo(np.float32).max


def with_changed_row(packed, role, field, row, value):
    """The run with one expert's row of codes or scales changed: layer 2, expert 3."""
    matrix = packed_run.experts(packed)[role]
    leaf = getattr(matrix, field).at[1, 3, row].set(value)
    return packed_run.with_experts(packed, **{role: dataclasses.replace(matrix, **{field: leaf})})


class TestRefusals:
    """Nothing is written."""

    LAYOUT = "nvfp4-pack-quantized"

    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "e").exists()

    def refuses(self, tmp_path, packed, message, layout=LAYOUT, **options):
        with pytest.raises(ConfigError, match=message) as caught:
            export.export(tmp_path / "e", packed, layout, **options)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("role", ["gate_up", "down"])
    def test_a_nan_scale(self, tmp_path, nvfp4, role):
        packed = with_changed_row(nvfp4[3], role, "scales", 5, np.uint8(0x7F))
        message = f"layer 2, expert 3, {role}: 2 block scales are NaN"
        self.refuses(tmp_path, packed, message)

    def test_a_nan_scale_of_mxfp4(self, tmp_path, mxfp4):
        packed = with_changed_row(mxfp4[3], "down", "scales", 5, np.uint8(0xFF))
        self.refuses(tmp_path, packed, "layer 2, expert 3, down: 1 block", "mxfp4-pack-quantized")

    def test_gate_and_up_with_two_global_scales(self, tmp_path, nvfp4):
        matrix = packed_run.experts(nvfp4[3])["gate_up"]
        amax = jnp.broadcast_to(matrix.global_amax[..., None], (2, EXPERTS, 2 * HIDDEN))
        amax = amax.at[1, 3, HIDDEN:].multiply(jnp.float32(2))
        packed = packed_run.with_experts(
            nvfp4[3], gate_up=dataclasses.replace(matrix, global_amax=amax)
        )
        self.refuses(tmp_path, packed, "layer 2, expert 3, gate_up: gate and up differ in global")

    def test_an_expert_without_calibration(self, tmp_path, nvfp4):
        for bad in (np.nan, 0.0, np.inf):
            amax = {layer: {r: a.copy() for r, a in roles.items()} for layer, roles in AMAX.items()}
            amax[1]["down"][2] = bad
            message = "layer 1, expert 2, down: no calibrated input scale"
            self.refuses(tmp_path, nvfp4[3], message, activations=True, input_amax=amax)

    def test_no_calibration_at_all(self, tmp_path, nvfp4):
        message = "layer 1, expert 0, gate_up: no calibrated input scale"
        self.refuses(tmp_path, nvfp4[3], message, activations=True)

    def test_a_rotation(self, tmp_path, nvfp4):
        facts = nvfp4[3].facts | {"rotation": 32, "method": {"kind": "hadamard_gptq"}}
        packed = dataclasses.replace(nvfp4[3], facts=facts)
        self.refuses(tmp_path, packed, "method hadamard_gptq rotates the rows")

    def test_an_input_factor(self, tmp_path, nvfp4):
        packed = packed_run.with_experts(nvfp4[3], input_scale=jnp.ones((2, WIDTH)))
        self.refuses(tmp_path, packed, "multiplies the rows .* by a factor per channel")

    def test_another_format(self, tmp_path, nvfp4, mxfp4):
        self.refuses(tmp_path, nvfp4[3], "mxfp4-pack-quantized holds mxfp4", "mxfp4-pack-quantized")
        self.refuses(tmp_path, mxfp4[3], "nvfp4-pack-quantized holds nvfp4, .* are mxfp4")

    def test_an_unknown_layout(self, tmp_path, nvfp4):
        self.refuses(tmp_path, nvfp4[3], "no layout 'gguf'; there are nvfp4-pack-", "gguf")

    def test_a_nan_in_the_rest(self, tmp_path, nvfp4):
        head = nvfp4[3].rest["head"].at[3, 4].set(jnp.nan)
        packed = dataclasses.replace(nvfp4[3], rest=nvfp4[3].rest | {"head": head})
        self.refuses(tmp_path, packed, "the head holds a NaN")

    @pytest.mark.parametrize(
        ("section", "field", "value"),
        [
            ("router", "kind", "hash"),
            ("moe", "capacity_factor", 1.25),
            ("moe", "slots_per_expert", 1),
        ],
    )
    def test_what_a_checkpoint_cannot_say(self, tmp_path, nvfp4, section, field, value):
        changed = configs.from_dict(nvfp4[3].facts["config"])
        sections = {section: {field: value}}
        if field == "kind":  # the router's other fields go with its kind
            changed = configs.from_dict(tiny.OVERRIDES | sections)
        else:
            with changed.unlocked():
                changed[section][field] = value
        config = json.loads(configs.canonical(changed))
        packed = dataclasses.replace(nvfp4[3], facts=nvfp4[3].facts | {"config": config})
        self.refuses(tmp_path, packed, f"{section}.{field}={value}")


class TestValidation:
    """Damage after the fact is found and named."""

    @pytest.fixture
    def folder(self, tmp_path, nvfp4):
        export.export(
            tmp_path / "e", nvfp4[3], "nvfp4-pack-quantized", activations=True, input_amax=AMAX
        )
        return tmp_path / "e"

    UP = "model.layers.2.mlp.experts.3.up_proj"

    def rewritten(self, folder, change):
        """Changes the tensors of the folder and its index; returns those before."""
        before = exported(folder)
        after = dict(before)
        change(after)
        tensor_file.save(folder / export.TENSORS, after)
        index = {"weight_map": dict.fromkeys(after, export.TENSORS)}
        (folder / export.INDEX).write_text(json.dumps(index))
        return before

    @pytest.mark.parametrize(
        ("leaf", "change", "message"),
        [
            (
                "weight_global_scale",
                lambda a: a * np.float32(2),
                "gate and up differ in weight_global",
            ),
            (
                "input_global_scale",
                lambda a: a * np.float32(2),
                "gate and up differ in input_global",
            ),
            ("weight_global_scale", lambda a: a * np.float32(np.inf), "must be finite"),
            ("input_global_scale", lambda a: a * np.float32(0), "must be finite and above 0"),
            ("weight_packed", lambda a: a[:, 1:], r"is uint8 \(32, 15\); wanted uint8 \(32, 16\)"),
            ("weight_scale", lambda a: a.view(np.uint8), "wanted float8_e4m3fn"),
            ("weight_scale", lambda a: (a.view(np.uint8) | 0x7F).view(a.dtype), "holds a NaN"),
        ],
    )
    def test_of_one_expert(self, folder, leaf, change, message):
        name = f"{self.UP}.{leaf}"
        self.rewritten(folder, lambda found: found.update({name: change(found[name])}))
        with pytest.raises(ConfigError, match=message) as caught:
            export.validate_export(folder)
        assert "experts.3" in str(caught.value)

    def test_a_missing_tensor(self, folder):
        self.rewritten(folder, lambda found: found.pop(f"{self.UP}.weight_scale"))
        with pytest.raises(ConfigError, match=f"{self.UP}.weight_scale is missing"):
            export.validate_export(folder)

    def test_one_changed_code(self, folder):
        def change(found):
            codes = found[f"{self.UP}.weight_packed"].copy()
            codes[31, 15] ^= 1
            found[f"{self.UP}.weight_packed"] = codes

        before = self.rewritten(folder, change)
        export.validate_export(folder)  # in itself it is right
        with pytest.raises(ConfigError, match=f"{self.UP}.weight_packed has other bytes"):
            export.validate_export(folder, before)

    def test_a_tensor_too_many(self, folder):
        extra = {"model.extra": np.zeros(2, np.float32)}
        before = self.rewritten(folder, lambda found: found.update(extra))
        with pytest.raises(ConfigError, match="model.extra is not in the source"):
            export.validate_export(folder, before)

    def test_an_index_of_another_file(self, folder):
        (folder / export.INDEX).write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(ConfigError, match="index and file differ in lm_head.weight"):
            export.validate_export(folder)

    def test_a_plain_linear_that_is_not_ignored(self, folder):
        described = json.loads((folder / export.CONFIG).read_text())
        described["quantization_config"]["ignore"].remove("lm_head")
        (folder / export.CONFIG).write_text(json.dumps(described))
        with pytest.raises(ConfigError, match="lm_head is not packed and not ignored"):
            export.validate_export(folder)
