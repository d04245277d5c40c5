"""Model families of Transformers in tiny random configurations, and how they are tried against eager."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from attention_cases.case import INFERENCE, TRAINING
from attention_oracle import differences, run
from attention_trial import Backend, clear
from torch import Tensor, nn

TOLERANCE: Final = 2e-4  # of the largest value, float32: a few layers of different summation order

TEXT: Final = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Final = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
BART: Final = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
VISION: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: unique; by default the model type of Transformers.
        kind: which inputs it takes, a key of ``INPUTS``.
        config: fields of its configuration.
        sites: attention sites of the model; 0 where it has none that softmax normalises.
        model_type: where it is not the name.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    sites: int = 1
    model_type: str = ""

    def build(self, implementation: str = "eager") -> nn.Module:
        """A model with random weights, equal for equal names, without dropout."""
        from transformers import AutoConfig, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # tiny vocabularies lie outside of what it expects
        config = AutoConfig.for_model(self.model_type or self.name, **self.config)
        without_dropout(config)
        torch.manual_seed(0)
        # experts as batched products: PyTorch 2.11 cannot differentiate the grouped ones of CPUs in one graph
        experts = {"experts_implementation": "batched_mm"} if "num_local_experts" in self.config else {}
        return AutoModel.from_config(config, attn_implementation=implementation, **experts)

    def inputs(self, padded: bool, device: str = "cpu", length: int = 11, batch: int = 3) -> dict[str, Tensor]:
        """Fresh random inputs by argument name; with ``padded``, sequences of different lengths and their mask."""
        generator = torch.Generator().manual_seed(1)
        made = INPUTS[self.kind](generator, padded, length, batch)
        return {name: x.to(device) for name, x in made.items()}


def without_dropout(config: Any) -> None:
    """Set every rate of dropout in a configuration, and in those inside it, to zero."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            without_dropout(value)
        elif ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def _tokens(generator: torch.Generator, batch: int, length: int) -> Tensor:
    return torch.randint(3, 99, (batch, length), generator=generator)


def _mask(batch: int, length: int, left: bool) -> Tensor:
    lengths = torch.tensor([length - 2 * (i % 3) for i in range(batch)])[:, None]
    positions = torch.arange(length)
    return ((positions >= length - lengths) if left else (positions < lengths)).long()


def _text(left: bool) -> Callable[..., dict[str, Tensor]]:
    def make(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
        inputs = {"input_ids": _tokens(generator, batch, length)}
        return inputs | ({"attention_mask": _mask(batch, length, left)} if padded else {})

    return make


def _sequence_to_sequence(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    inputs = {
        "input_ids": _tokens(generator, batch, length),
        "decoder_input_ids": _tokens(generator, batch, length - 4),
    }
    return inputs | ({"attention_mask": _mask(batch, length, left=False)} if padded else {})


def _pixels(size: int) -> Callable[..., dict[str, Tensor]]:
    return lambda generator, padded, length, batch: {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}


def _whisper(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(2, 8, 32, generator=generator),
        "decoder_input_ids": _tokens(generator, 2, 7),
    }


def _waveform(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 512, generator=generator)}


def _spectrogram(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 24, 16, generator=generator)}


def _video(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 2, 3, 16, 16, generator=generator)}


def _text_and_pixels(generator: torch.Generator, padded: bool, length: int, batch: int) -> dict[str, Tensor]:
    return {**_text(False)(generator, padded, length, 2), **_pixels(16)(generator, padded, length, 2)}


INPUTS: Final[dict[str, Callable[..., dict[str, Tensor]]]] = {
    "decoder": _text(left=True),
    "encoder": _text(left=False),
    "sequence_to_sequence": _sequence_to_sequence,
    "vision": _pixels(16),
    "vision32": _pixels(32),
    "whisper": _whisper,
    "waveform": _waveform,
    "spectrogram": _spectrogram,
    "video": _video,
    "text_and_pixels": _text_and_pixels,
}


def _decoder(name: str, config: Mapping[str, Any] = GROUPED, sites: int = 1, **more: Any) -> Family:
    model_type = more.pop("model_type", "")
    return Family(name, "decoder", {**config, "use_cache": False, **more}, sites, model_type)


def _encoder(name: str, sites: int = 1, **more: Any) -> Family:
    return Family(name, "encoder", {**TEXT, **more}, sites)


def _vision(name: str, sites: int = 1, kind: str = "vision", **more: Any) -> Family:
    return Family(name, kind, {**VISION, **more}, sites)


_GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 48}
_GPT_NEO = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
}
_SPEECH = {
    **{k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
    "conv_dim": [16, 16],
    "conv_kernel": [8, 3],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}

FAMILIES: Final[tuple[Family, ...]] = (
    # decoders
    _decoder("llama", num_hidden_layers=2, sites=2),
    _decoder("llama_multihead", {**GROUPED, "num_key_value_heads": 4}, model_type="llama"),
    _decoder("mistral", num_hidden_layers=2, sites=2, sliding_window=4),
    _decoder("qwen2"),
    _decoder("qwen3"),
    _decoder("gemma"),
    _decoder("gemma2", num_hidden_layers=2, sites=2, sliding_window=4, query_pre_attn_scalar=8),
    _decoder("gemma3_text", num_hidden_layers=2, sites=2, sliding_window=4, query_pre_attn_scalar=8),
    _decoder("gpt_oss", num_hidden_layers=2, sites=2, sliding_window=4, num_local_experts=2, num_experts_per_tok=1),
    _decoder("phi", TEXT),
    _decoder("phi3"),
    _decoder("gpt2", _GPT2),
    _decoder("gpt_bigcode", _GPT2),
    _decoder("gpt_neo", _GPT_NEO, sites=2),
    _decoder("gpt_neox", TEXT),
    _decoder("gptj", _GPT2, rotary_dim=4),
    _decoder("codegen", _GPT2, rotary_dim=4),
    _decoder("openai-gpt", _GPT2),
    _decoder("opt", TEXT, ffn_dim=48, word_embed_proj_dim=32),
    _decoder("bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
    _decoder("mpt", {"vocab_size": 99, "d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64}),
    _decoder("falcon", TEXT, new_decoder_architecture=False, multi_query=True),
    _decoder("falcon_alibi", TEXT, model_type="falcon", alibi=True, multi_query=False),
    _decoder("stablelm"),
    _decoder("cohere"),
    _decoder("olmo"),
    _decoder("olmo2"),
    _decoder("granite"),
    _decoder("glm", head_dim=8),
    _decoder("starcoder2"),
    _decoder("persimmon", TEXT),
    _decoder("biogpt", TEXT),
    _decoder("xglm", {**BART, "num_layers": 1, "attention_heads": 4, "ffn_dim": 48}),
    _decoder("nemotron"),
    _decoder("smollm3"),
    _decoder("helium"),
    _decoder("ctrl", {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "dff": 48}),
    _decoder(
        "deepseek_v3",
        TEXT,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    _decoder("diffllama", sites=2),  # the difference of two softmaxes
    _decoder("doge", sites=1, keep_window_size=64),  # a mask computed from the values
    _decoder("cohere2", num_hidden_layers=2, sites=2, sliding_window=4),
    _decoder("lfm2", num_hidden_layers=2, sites=1, layer_types=["conv", "full_attention"]),
    # encoders
    _encoder("bert"),
    _encoder("cpmant", sites=1, dim_head=8, dim_ff=48, prompt_length=4),
    _encoder("convbert", sites=1, embedding_size=32, conv_kernel_size=3),
    _encoder("mobilebert", sites=1, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32),
    _encoder("roberta"),
    _encoder("electra", embedding_size=16),
    _encoder("albert", embedding_size=16),
    Family(
        "distilbert",
        "encoder",
        {"vocab_size": 99, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    _encoder("mpnet"),
    _encoder("deberta"),
    _encoder("deberta-v2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _encoder("roformer", embedding_size=32),
    _encoder(
        "modernbert",
        num_hidden_layers=2,
        sites=2,
        global_attn_every_n_layers=2,
        local_attention=4,
        reference_compile=False,
    ),
    _encoder("esm", position_embedding_type="rotary", mask_token_id=3, token_dropout=False),
    _encoder("layoutlm"),
    _encoder("ernie"),
    # encoder and decoder: encoder, decoder and cross attention
    Family(
        "t5",
        "sequence_to_sequence",
        {
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        3,
    ),
    Family("bart", "sequence_to_sequence", BART, 3),
    Family("mbart", "sequence_to_sequence", BART, 3),
    Family("pegasus", "sequence_to_sequence", BART, 3),
    Family("marian", "sequence_to_sequence", {**BART, "decoder_vocab_size": 99}, 3),
    Family("m2m_100", "sequence_to_sequence", BART, 3),
    Family("blenderbot", "sequence_to_sequence", BART, 3),
    Family(
        "whisper", "whisper", {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}, 3
    ),
    # vision
    _vision("vit"),
    _vision("deit"),
    _vision("beit", use_relative_position_bias=True),
    _vision("dinov2"),
    _vision("clip_vision_model"),
    _vision("siglip_vision_model", sites=2),
    _vision("vivit", kind="video", num_frames=2, tubelet_size=[1, 4, 4]),
    Family(
        "swin",
        "vision",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        2,
    ),
    Family(
        "swinv2",
        "vision",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
        2,
    ),
    Family(
        "segformer",
        "vision32",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        2,
    ),
    Family(
        "pvt",
        "vision32",
        {
            "image_size": 32,
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [4, 2],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
        2,
    ),
    # speech and several kinds of input
    Family("wav2vec2", "waveform", _SPEECH),
    Family("hubert", "waveform", _SPEECH),
    Family(
        "audio-spectrogram-transformer",
        "spectrogram",
        {**VISION, "max_length": 24, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
    ),
    Family("clip", "text_and_pixels", {"text_config": {**TEXT}, "vision_config": {**VISION}, "projection_dim": 16}, 2),
)


@dataclass
class FamilyResult:
    """What a family gave under a backend.

    Attributes:
        problems: outputs and gradients that differ from eager's.
        failed: whether the backend raised; the exception is the only problem then.
    """

    family: str
    backend: str
    mode: str
    implementation: str
    padded: bool
    sites: int
    expected: int
    problems: list[str] = field(default_factory=list)
    failed: bool = False
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems


def try_family(
    family: Family,
    backend: Backend,
    *,
    mode: str = INFERENCE,
    implementation: str = "eager",
    padded: bool = True,
    dynamic: bool = False,
    device: str = "cpu",
) -> FamilyResult:
    """Compile and run one model, count its fused sites, and compare outputs and parameter gradients with eager's."""
    clear()
    start = time.perf_counter()
    result = FamilyResult(family.name, backend.name, mode, implementation, padded, 0, family.sites)
    model = family.build(implementation).to(device).train(mode == TRAINING)
    names, inputs = zip(*family.inputs(padded, device).items(), strict=True)
    named = lambda function: lambda *tensors: function(**dict(zip(names, tensors, strict=True)))
    training = mode == TRAINING
    eager = run(named(model), inputs, training=training, parameters=model)
    try:
        compiled = backend.compile(model, dynamic=dynamic, fullgraph=False)
        ours = run(named(compiled), inputs, training=training, parameters=model)
        result.sites = backend.sites()
        units = TOLERANCE / torch.finfo(torch.float32).eps
        result.problems = differences(ours, eager, eager, floor_units=units)
    except Exception as error:  # noqa: BLE001  # whatever a backend raises is its result
        result.problems, result.failed = [f"{type(error).__name__}: {str(error).strip()[:600]}"], True
    result.seconds = time.perf_counter() - start
    return result
