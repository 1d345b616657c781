"""Tokenizers: lossless text, the same ids as the original library, files that others can read, clear errors."""

import json
import random
from pathlib import Path

import pytest

import tritium
from tritium.core.config import UserError
from tritium.core.tokenizer import Tokenizer, train_tokenizer

DATA = Path(tritium.__file__).parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data beside the checkout")

TEXT = """The quick brown fox jumps over the lazy dog. The dog sleeps, the fox runs: 2024 and 1999.
def f(x):
\treturn x ** 2    # squares

今日はいい天気です。明日もいい天気でしょう。
今天天气很好。明天天气也很好。
Don't panic! "Quotes" – and dashes — everywhere…
"""
SAMPLES = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces  ",
    "你好，世界！今天是2024年5月1日。",
    "日本語のテキスト",
    "def f(x):\n    return x ** 2\n\n\tprint('1234567890')\r\n",
    "😀🚀 👩‍👩‍👧‍👦 naïve café",
    "\n\n\t\n ",
    "nul \x00 bell \x07 del \x7f bom \ufeff reserved \u2585 surrogates' edges \ud7ff\ue000 last \U0010ffff",
    "<s></s><pad><unk><|im_start|>system<|im_end|><0x0A>",
    "<think>two</think> tags",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT] * 3, 420, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip_is_lossless(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_unicode(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        limit = rng.choice([0x80, 0x3000, 0x110000])
        text = "".join(chr(rng.randrange(limit)) for _ in range(rng.randrange(30)))
        text = "".join(c for c in text if not "\ud800" <= c <= "\udfff" and c != "\u2581")
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_one_character_that_sentencepiece_cannot_keep(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_text_never_becomes_a_control_token(tokenizer):
    control = {tokenizer.special_id(p) for p in ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")}
    assert None not in control and not control & set(tokenizer.encode("".join(SAMPLES)))


def test_tags_of_reasoning_are_single_tokens_of_ordinary_text(tokenizer):
    tags = [tokenizer.special_id("<think>"), tokenizer.special_id("</think>")]
    ids = tokenizer.encode("<think>a</think>")
    assert [ids[0], ids[-1]] == tags and tokenizer.decode(ids) == "<think>a</think>"


def test_bos_and_eos_are_placed_once_and_left_out_of_the_text(tokenizer):
    ids = tokenizer.encode("dog", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("dog"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "dog" and tokenizer.decode(ids, keep_special=True) == "<s>dog</s>"


def test_digits_lines_and_runs_of_spaces(tokenizer):
    pieces = [tokenizer.piece(i) for i in tokenizer.encode("2024")]
    assert pieces == ["2", "0", "2", "4"]
    newline = tokenizer.encode("\n")
    assert len(newline) == 1 and tokenizer.encode("dog\n\nfox") == [
        *tokenizer.encode("dog"),
        *newline * 2,
        *tokenizer.encode("fox"),
    ]
    assert len(tokenizer.encode("x    y")) < len(tokenizer.encode("x y")) + 3


def test_encode_batch_equals_encode(tokenizer):
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]
    assert tokenizer.encode_batch([]) == []


def test_streaming_never_emits_half_a_character_and_adds_up(tokenizer):
    text = "a😀é👩‍👧 猫\n"
    decoder, shown = tokenizer.incremental(), []
    for i in tokenizer.encode(text):
        shown.append(decoder.push(i))
    assert "\ufffd" not in "".join(shown) and "😀" in shown
    assert "".join(shown) + decoder.finish() == text


def test_a_character_that_stays_unfinished_shows_as_replacement(tokenizer):
    start = tokenizer.encode("😀")[:2]
    assert tokenizer.decode(start) == "\ufffd"
    assert tokenizer.decode([*start, *tokenizer.encode("dog")]) == "\ufffddog"


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.piece(bad)


def test_a_lone_surrogate_is_named(tokenizer):
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"U\+DC80 at character 2"):
            call("ab\udc80")


def test_saved_files_are_what_transformers_reads(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and not config["add_prefix_space"]
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    added = {token["content"]: (int(i), token["special"]) for i, token in config["added_tokens_decoder"].items()}
    for piece, special in (("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False), ("</s>", True)):
        assert added[piece] == (tokenizer.special_id(piece), special)


def test_training_is_deterministic(tmp_path):
    def pieces(threads: int) -> list[str]:
        trained = train_tokenizer(iter([TEXT, TEXT]), 400, tmp_path, threads=threads)
        return [trained.piece(i) for i in range(trained.vocab_size)]

    assert pieces(1) == pieces(2) == pieces(2)


def test_a_vocabulary_that_is_too_large_says_how_large_it_may_be(tmp_path):
    with pytest.raises(UserError, match="largest possible is") as caught:
        train_tokenizer(["hello world\n"], 5000, tmp_path)
    largest = int(str(caught.value).partition("possible is ")[2].partition(";")[0])
    assert train_tokenizer(["hello world\n"], largest, tmp_path).vocab_size == largest
    with pytest.raises(UserError, match=f"largest possible is {largest}"):
        train_tokenizer(["hello world\n"], largest + 1, tmp_path)


@pytest.mark.parametrize("text", [TEXT * 3, "".join(chr(0x4E00 + i * i % 2000) for i in range(4000))])
def test_without_a_size_it_is_one_that_the_text_supports(tmp_path, text):
    made = train_tokenizer([text], None, tmp_path)
    assert 270 < made.vocab_size <= 384 and made.decode(made.encode(text)) == text
    many = train_tokenizer([text], None, tmp_path, special=[f"<|{i}|>" for i in range(200)])
    assert many.vocab_size > 460 and many.special_id("<|199|>") is not None


@needs_data
def test_a_little_text_has_a_token_for_64_characters(tmp_path):
    text = (DATA / "text" / "tinystories.txt").read_text(encoding="utf-8")[:60_000]
    assert train_tokenizer([text], None, tmp_path).vocab_size == 896


def test_a_small_vocabulary_spells_rare_characters_in_bytes(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(500)) + "的的的的是是是一一" * 20  # more characters than room
    trained = train_tokenizer([text], 290, tmp_path)
    assert trained.vocab_size == 290 and len(trained.encode("的是")) == 2
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "words"),
    [
        ([], 300, "no text"),
        (["", "\n\n"], 300, "no text"),
        (["abc"], 200, "alone are"),
        (["a\ud800"], 300, "surrogate"),
    ],
)
def test_what_cannot_be_trained_on_is_said(tmp_path, texts, vocab_size, words):
    with pytest.raises(UserError, match=words):
        train_tokenizer(texts, vocab_size, tmp_path)


def test_very_long_lines_are_learned_from(tmp_path):
    trained = train_tokenizer(["abcab" * 60_000], 275, tmp_path)
    assert len(trained.encode("abcab" * 10)) < 20


def test_what_is_not_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.*No such file"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer here.*found nothing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer that can be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}, "pre_tokenizer": null, "decoder": null}')
    with pytest.raises(UserError, match="no byte-level BPE.*tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's ranks go by this name too
    with pytest.raises(UserError, match="tokenizer.model: a tiktoken file of 2 ranks, whose pattern is unknown"):
        Tokenizer.load(tmp_path)


@needs_data
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mistral-v3", "mistral-v3"),
        ("t5", "t5/sentencepiece.model"),
        ("sentencepiece-test-ja", "sentencepiece-test-ja/test_ja_model.model"),
    ],
)
def test_ids_and_text_equal_the_original_library(name, file):
    import sentencepiece

    golden = json.loads((DATA / "tokenizers" / "GOLDEN.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(DATA / "tokenizers" / file)
    path = DATA / "tokenizers" / file
    library = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model" if path.is_dir() else path))
    for text, ids in zip(golden["strings"], golden["ids"][name], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids)


@needs_data
def test_absent_special_tokens_are_none():
    t5 = Tokenizer.load(DATA / "tokenizers" / "t5" / "sentencepiece.model")
    assert (t5.bos_id, t5.eos_id, t5.pad_id, t5.unk_id) == (None, 1, 0, 2)
    assert t5.special_id("<|im_end|>") is None
    with pytest.raises(ValueError, match="no BOS"):
        t5.encode("a", bos=True)
