"""What FP4 weights cost two real models in quality: perplexity and KL of SmolLM2-135M, embeddings of all-MiniLM-L6-v2.

python bench/fp4_models.py               writes bench/results/fp4_models.json

The text is Python's own documentation (``pydoc_data.topics``): every other paragraph is evaluated on, the rest is what
the calibrated rows were calibrated on. SmolLM2's weights come from a 4-bit file (GGUF Q4_1), so FP4 rounds them
again; small models suffer most. Layers compute in float32 with the FP4 values, embeddings and logits stay as they are.
"""

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import record

from vbcompile.demo_models import (
    english_paragraphs,
    english_sentences,
    load_minilm,
    load_smollm2,
    mean_embedding,
)
from vbcompile.fp4_calibration import calibrate, calibration_tokens
from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.passes.fp4_weights import adopt

LENGTH = 512
ROWS = [
    ("NVFP4, round to nearest", "nvfp4", "nearest"),
    ("NVFP4, 4/6", "nvfp4", "four_over_six"),
    ("NVFP4, searched scales (default)", "nvfp4", "mse"),
    ("NVFP4, calibrated", "nvfp4", "calibrated"),
    ("MXFP4, round to nearest", "mxfp4", "nearest"),
    ("MXFP4, searched scales (default)", "mxfp4", "mse"),
    ("MXFP4, calibrated", "mxfp4", "calibrated"),
]


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers that are packed: all but the projection onto the vocabulary."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]


def pack_model(model: nn.Module, format_name: str, method: str) -> None:
    """Give the layers the FP4 values of a method, and the compiler their codes."""
    with torch.no_grad():
        for layer in linear_layers(model):
            packed = quantize(layer.weight, format_name, method=method)
            layer.weight.copy_(dequantize(packed))
            adopt(layer.weight, packed)


@torch.no_grad()
def score(model: Any, tokens: Tensor, base: list[Tensor] | None) -> tuple[float, float, float, list[Tensor]]:
    """Mean negative log-likelihood, KL of ``base`` to the model, share of equal first choices, log-probabilities."""
    loss = divergence = agreeing = 0.0
    found = []
    for index, row in enumerate(tokens):
        out = model(input_ids=row[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        loss -= float(out.gather(1, row[1:, None]).mean())
        if base is None:
            found.append(out.half())
            continue
        known = base[index].float()
        divergence += float((known.exp() * (known - out)).sum(-1).mean())
        agreeing += float((known.argmax(-1) == out.argmax(-1)).float().mean())
    return loss / len(tokens), divergence / len(tokens), agreeing / len(tokens), found


def language_rows(count: int, calibration_count: int, device: str, rows: list[dict[str, Any]]) -> None:
    """Add a row to ``rows`` for each way to pack SmolLM2, and write the file after each."""
    model, tokenizer = load_smollm2(device)
    model.config._attn_implementation = "sdpa"
    text = "\n\n".join(english_paragraphs()[1::2])
    tokens = torch.tensor(tokenizer(text)["input_ids"][:count]).to(device)
    tokens = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    inputs = calibration_tokens(tokenizer, None, calibration_count, LENGTH).to(device)
    base_loss, _, _, base = score(model, tokens, None)
    whole = {"weights": "as they are", "perplexity": round(math.exp(base_loss), 3), "tokens": tokens.numel()}
    add(rows, {"model": "SmolLM2-135M", **whole})
    for label, format_name, method in ROWS:
        twin = copy.deepcopy(model)
        if method == "calibrated":
            calibrate(twin, {"input_ids": inputs, "use_cache": False}, format_name=format_name)
        else:
            pack_model(twin, format_name, method)
        loss, divergence, agreeing, _ = score(twin, tokens, base)
        row = {
            "model": "SmolLM2-135M",
            "weights": label,
            "perplexity": round(math.exp(loss), 3),
            "increase_percent": round(100 * (math.exp(loss - base_loss) - 1), 1),
            "kl": round(divergence, 4),
            "same_first_choice": round(agreeing, 3),
        }
        add(rows, row)


@torch.no_grad()
def embedding_rows(count: int, device: str, rows: list[dict[str, Any]]) -> None:
    """The same for MiniLM's sentence embeddings."""
    model, tokenizer = load_minilm(device)
    batch = tokenizer(english_sentences(count), padding=True, return_tensors="pt").to(device)
    batch.pop("token_type_ids", None)
    want = mean_embedding(model(**batch).last_hidden_state, batch["attention_mask"])
    for label, format_name, method in (row for row in ROWS if row[2] != "four_over_six"):
        twin = copy.deepcopy(model)
        if method == "calibrated":
            other = tokenizer(english_sentences(4 * count)[1::4], padding=True, return_tensors="pt").to(device)
            other.pop("token_type_ids", None)
            calibrate(twin, dict(other), format_name=format_name)
        else:
            pack_model(twin, format_name, method)
        got = mean_embedding(twin(**batch).last_hidden_state, batch["attention_mask"])
        cosine = (got * want).sum(-1)
        row = {"weights": label, "cosine": round(float(cosine.mean()), 4), "least": round(float(cosine.min()), 4)}
        add(rows, {"model": "all-MiniLM-L6-v2", **row})


def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Print a row and write all so far, since a whole run takes a processor long."""
    rows.append(row)
    print(row, flush=True)
    record.write("fp4_models", rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens to evaluate on")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    language_rows(arguments.tokens, arguments.calibration_tokens, arguments.device, rows)
    embedding_rows(arguments.sentences, arguments.device, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
