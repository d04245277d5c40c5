"""Attention on simulated vendors: arguments by their true schemas over several releases, results by the 2x rule."""

import pytest
import torch
from attention_cases.case import INFERENCE, TRAINING
from attention_corpus import CASES
from attention_forms import make_forms
from vendors import intel
from vendors.coverage import run
from vendors.packages import HPU_RELEASES, NPU_RELEASES, SCHEMAS, XPU_RELEASES
from vendors.trial import intel_gpu, pretend, results, vendor

from vbcompile.config_error import ConfigError
from vbcompile.device import Target
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.attention_band import Band, mask_band
from vbcompile.kernels.registry import force, operator
from vbcompile.kernels.score_function import ScoreFunction

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = make_forms(37, 53, 16, 24)
FEW = make_forms(5, 53, 16, 16)  # few queries: the operator for inference
# what a bias, a mask and sinks do not express
OTHERS = {"softcap", "temperature", "oddities", "sink_per_row", "arcs"}
RANDOM = {"dropout"}
ALL = [name for name in FORMS if name not in RANDOM]
SAMPLE = [
    "plain", "causal", "causal_bottom_right", "causal_empty_rows", "window", "bool_mask", "bias_rows", "alibi", "sink",
    "grouped", "rows_first",
]  # fmt: skip


def check(rows):
    wrong = [(name, error, allowed) for name, error, allowed in rows if not error <= allowed]
    assert not wrong, wrong


# ----------------------------------------------------------------------------------- every form, natively
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["npu", "hpu"])
def test_every_form(kind, name):
    forward, backward = {
        "npu": ("npu_fusion_attention", "npu_fusion_attention_grad"),
        "hpu": ("sdpa_recomp_fwd", "sdpa_recomp_bwd"),
    }[kind]
    with vendor(kind) as package:
        check(results(FORMS[name], torch.float32, all_gradients=False))
    if name in OTHERS:
        assert package.calls == []
        return
    assert package.calls[0].startswith(forward)
    if name != "additive_min":  # rows of one huge bias: lse cannot hold their number of keys
        assert package.calls[1].startswith(backward) and len(package.calls) == 2


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize(
    ("kind", "version"), [*(("npu", v) for v in NPU_RELEASES), *(("hpu", v) for v in HPU_RELEASES)]
)
def test_releases(kind, version, name):
    """The dispatcher holds each call against this release's schema."""
    with vendor(kind, version) as package:
        check(results(FORMS[name], torch.bfloat16, all_gradients=False))
    assert len(package.calls) == 2


@pytest.mark.parametrize(
    "name", ["plain", "causal_bottom_right", "window", "key_padding", "sink", "grouped", "bias_rows"]
)
@pytest.mark.parametrize(("version", "called"), [*zip(NPU_RELEASES, ("", "_v2", "_v2"), strict=True)])
def test_few_queries_on_ascend(version, called, name):
    with vendor("npu", version) as package:
        check(results(FEW[name], torch.bfloat16, all_gradients=False))
    # a float32 bias beside bfloat16 queries needs the other operator
    wide = name == "bias_rows"
    assert package.calls[0] == ("npu_fusion_attention_v2" if wide else f"npu_fused_infer_attention_score{called}")


def test_one_query_on_ascend():
    with vendor("npu") as package:
        check(results(make_forms(1, 40, 16, 16)["key_padding"], torch.float16, all_gradients=False))
    assert package.calls[0] == "npu_fused_infer_attention_score_v2"


@pytest.mark.parametrize("version", XPU_RELEASES)
@pytest.mark.parametrize("name", ["plain", "causal", "rows_first"])
def test_intel(name, version):
    """Beside the installed PyTorch's own schema, that of each release holds the call."""
    with intel_gpu(version) as calls:
        check(results(make_forms(33, 33, 64, 64)[name], torch.bfloat16))
    assert [c.endswith("backward") for c in calls] == [False, True]


def test_recorded_schemas_of_pytorch():
    """The installed release's are those recorded, and a call that a recorded one does not take is refused."""
    for recorded in SCHEMAS["torch"]["releases"].get(torch.__version__.partition("+")[0], ()):
        own = getattr(torch.ops.aten, recorded.partition("::")[2].partition("(")[0]).default._schema
        assert own == torch._C.parse_schema(recorded)
    q = torch.randn(1, 2, 8, 64).bfloat16()
    with intel.kernels_of(XPU_RELEASES[-1]) as kernels, pytest.raises(RuntimeError, match="window"):
        kernels["_scaled_dot_product_flash_attention"](q, q, q, window=1)


# ------------------------------------------------------------------------------------------------ choices
@pytest.mark.parametrize(
    ("arch", "name", "fields", "reason"),
    [
        ("Ascend910B1", "softcap", {}, "no score function beyond"),
        ("Ascend910B1", "plain", {"dtype": torch.float64}, "not torch.float64"),
        ("Ascend910B1", "bias", {"needs": (True,) * 4}, "no gradient for the bias"),
        ("Ascend910B1", "plain", {"lse_gradient": True}, "logarithm of the softmax's sum"),
        ("Ascend310P3", "plain", {}, "needs an Ascend 910B, 910_93 or 950, this is Ascend310P3"),
        ("gaudi2", "dropout", {}, "draws a seed of its own"),
        ("gaudi3", "softcap", {}, "no score function beyond"),
        ("pvc", "bool_mask", {}, "knows no bias, mask or score function"),
        ("bmg", "plain", {"dtype": torch.float32}, "takes float16 and bfloat16"),
    ],
)
def test_refusals_say_why(arch, name, fields, reason):
    target = Target("huawei", "npu", arch) if arch == "Ascend310P3" else catalog_target(arch)
    choice = operator("attention_backward" if fields.get("needs") else "attention").choose(
        target, FORMS[name].case(**fields)
    )
    own = [text for other, text in (*choice.refused, *choice.elsewhere) if other.startswith(target.device_type)]
    assert any(reason in text for text in own), own


@pytest.mark.parametrize(("arch", "name"), [("Ascend910B1", "npu_fusion"), ("gaudi2", "hpu_fused")])
def test_chosen_ahead_of_time(arch, name):
    """For a machine that is not here its package counts as installed."""
    assert operator("attention").choose(catalog_target(arch), FORMS["causal"].case()).implementation.name == name
    backward = operator("attention_backward").choose(catalog_target(arch), FORMS["causal"].case(needs=(True,) * 3))
    assert backward.implementation.name == name


def test_a_missing_operator_names_package_releases_and_fallback():
    with pretend(catalog_target("Ascend910B1"), "2.0.1"):
        choice = operator("attention").choose(catalog_target("Ascend910B1"), FORMS["causal"].case())
    assert choice.implementation.name == "reference"
    assert (
        "npu::npu_fusion_attention needs 2.1 or later of torch-npu (found 2.0.1); plain PyTorch runs instead"
        in choice.explain()
    )


def test_a_missing_argument_names_it():
    with vendor("npu", NPU_RELEASES[0]):
        choice = operator("attention").choose(catalog_target("Ascend910B1"), FORMS["dropout"].case())
    assert (
        "npu::npu_fusion_attention with 'seed' needs 2.7.1 or later of torch-npu (found 2.5.1.post1)"
        in choice.explain()
    )


def test_an_unknown_argument_is_refused_not_guessed(monkeypatch):
    """A later release may want more than its operator's name and our arguments."""
    schemas = SCHEMAS["habana-torch-plugin"]["releases"]
    wanting = [s.replace("str seq_padding_type)", "str seq_padding_type, int new)") for s in schemas["1.19.0"]]
    monkeypatch.setitem(schemas, "9.0.0", wanting)
    with vendor("hpu", "9.0.0"):
        choice = operator("attention").choose(catalog_target("gaudi2"), FORMS["causal"].case())
    assert choice.implementation.name == "reference"
    reason = "hpu::sdpa_recomp_fwd of habana-torch-plugin (found 9.0.0) wants 'new', which is not known here"
    assert f"{reason}; plain PyTorch runs instead" in choice.explain()


def test_dropout_is_not_split_between_implementations():
    with (
        vendor("npu"),
        force(attention_backward="reference"),
        pytest.raises(ConfigError, match="force both or neither"),
    ):
        results(FORMS["dropout"], torch.float32)


def test_wrong_calls_are_seen():
    """The simulation refuses what the package would."""
    q = torch.randn(1, 4, 8, 16)
    with vendor("npu"), pytest.raises(RuntimeError, match="upper triangle"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 4, "BNSD", sparse_mode=2, atten_mask=torch.ones(8, 8).bool())
    with vendor("npu", NPU_RELEASES[0]), pytest.raises(RuntimeError, match="sink"):
        torch.ops.npu.npu_fusion_attention(q, q, q, 4, "BNSD", sink=torch.zeros(4))
    with vendor("hpu"), pytest.raises(RuntimeError, match="GQA must be reshaped"):
        torch.ops.hpu.sdpa_recomp_fwd(q, q[:, :2], q[:, :2], None, 0.0, 0.3, False, True, "none", None, "left")
    assert not hasattr(torch.ops.npu, "npu_fusion_attention")


# -------------------------------------------------------------------------------------------------- bands
@pytest.mark.parametrize(
    ("name", "band"),
    [
        ("causal", (None, 0)),
        ("causal_offset", (None, 9)),
        ("causal_bottom_right", (None, 53 - 37)),
        ("window", (-6, 0)),
        ("both_sides", (-5, 5)),
    ],
)
def test_bands(name, band):
    found = mask_band(FORMS[name].function, 37, 53)
    assert found is not None
    i, j = torch.arange(37).unsqueeze(1), torch.arange(53)
    seen = (j - i >= found.low) & (j - i <= found.high)
    low, high = (-(2**31) if band[0] is None else band[0]), band[1]
    assert torch.equal(seen, (j - i >= low) & (j - i <= high))


@pytest.mark.parametrize("name", ["prefix", "document", "bool_mask", "static_cache", "plain"])
def test_other_masks_are_no_band(name):
    assert mask_band(FORMS[name].function, 37, 53) is None


def test_band_limits():
    assert Band(high=-1).reaches_all_rows(4, 4) is False  # the first row sees nothing
    assert Band(low=2).reaches_all_rows(4, 4) is False  # the last one
    assert Band(low=1, high=0).reaches_all_rows(4, 8) is False
    assert Band(-3, 3).sees_everything(4, 4) and not Band(-2, 3).sees_everything(4, 4)
    everything = ScoreFunction((("score",), ("const", True)), 0, 1)
    assert mask_band(everything, 4, 4) == Band()


# ------------------------------------------------------------------------------------------------- corpus
def _sample(every: int, start: int):
    chosen = [*CASES.values()][start::every]
    return [pytest.param(c, m, id=f"{c.name}-{m}") for c in chosen for m in (INFERENCE, TRAINING) if m in c.modes]


@pytest.mark.parametrize(
    ("case", "mode"),
    [
        *_sample(24, 3),
        pytest.param(CASES["DropoutModule"], TRAINING, id="dropout"),
        pytest.param(CASES["fill_low_then_raised"], TRAINING, id="scores of a thousand"),
    ],
)
def test_corpus_on_ascend(case, mode):
    found = run("npu", case, mode)
    assert not found.problems, found


@pytest.mark.parametrize(("case", "mode"), _sample(30, 11))
def test_corpus_on_gaudi(case, mode):
    found = run("hpu", case, mode)
    assert not found.problems, found


@pytest.mark.parametrize(
    ("case", "mode"), [*_sample(40, 7), pytest.param(CASES["one_key_head_by_expand"], TRAINING, id="one key head")]
)
def test_corpus_on_intel(case, mode):
    found = run("xpu", case, mode)
    assert not found.problems, found
