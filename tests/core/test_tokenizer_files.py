"""Every kind of tokenizer file: the ids of the original libraries, on real vocabularies and on adversarial ones."""

import json
import random
from pathlib import Path

import pytest

import tritium
from tritium.core import batch
from tritium.core.chat import render
from tritium.core.tokenizer import Tokenizer

DATA = Path(tritium.__file__).parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the shared data beside the checkout")
BYTE_LEVEL = ["qwen-tiktoken", "llama3", "deepseek", "qwen3-hf", "mistral-tekken-240718", "gpt2"]
TOKENIZERS = {}


def load(name: str) -> Tokenizer:
    if name not in TOKENIZERS:
        TOKENIZERS[name] = Tokenizer.load(DATA / "tokenizers" / name)
    return TOKENIZERS[name]


def texts(count: int, seed: int = 0) -> list[str]:
    """English, Chinese, Japanese, code, emoji, digits, white space and random Unicode."""
    rng, samples = random.Random(seed), []
    for file in ("tinyshakespeare.txt", "wagahai_ja.txt", "fever_zh.txt"):
        text = (DATA / "text" / file).read_text(encoding="utf-8")
        for _ in range(count // 6):
            start = rng.randrange(len(text) - 300)
            samples.append(text[start : start + rng.randrange(300)])
    source = Path(batch.__file__).read_text(encoding="utf-8")
    samples += [source[i : i + 200] for i in range(0, len(source), 997)]
    alphabet = " \n\r\t\u3000\u00a0'sStT0123456789abcXYZ.,!/-_=#<>|😀👩‍👧é한αЖ中の\u0301"
    while len(samples) < count:
        pool = (
            alphabet
            if rng.random() < 0.6
            else [chr(rng.choice((0x250, 0x3000, 0xFFFF)) - rng.randrange(0x200)) for _ in "ab"]
        )
        samples.append("".join(rng.choice(pool) for _ in range(rng.randrange(40))))
    return samples


@needs_data
@pytest.mark.parametrize("name", [name for name in BYTE_LEVEL if name != "gpt2"])
def test_ids_equal_the_golden_ones(name):
    golden = json.loads((DATA / "tokenizers" / "GOLDEN.json").read_text(encoding="utf-8"))
    ids = next(value for key, value in golden["ids"].items() if key.startswith(name))
    offset = 1000 if "tekken" in name else 0
    for text, expected in zip(golden["strings"], ids, strict=True):
        assert load(name).encode(text) == [i + offset for i in expected]
    assert load(name).encode_batch(golden["strings"]) == [[i + offset for i in row] for row in ids]


@needs_data
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_round_trips(name):
    import unicodedata

    for text in texts(200, seed=1):
        kept = unicodedata.normalize("NFC", text) if name == "qwen3-hf" else text
        assert load(name).decode(load(name).encode(text)) == kept


def reference(name: str):
    import tokenizers

    folder = DATA / "tokenizers" / name
    if name != "gpt2":
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return library


@needs_data
@pytest.mark.parametrize("name", ["qwen3-hf", "deepseek", "gpt2"])
def test_ids_equal_hugging_faces_library(name):
    library = reference(name)
    for text in texts(600):
        assert load(name).encode(text) == library.encode(text, add_special_tokens=False).ids, repr(text)


NORMALISERS = {
    "digits": lambda n, regex: [n.NFKC(), n.Lowercase()],
    "falcon": lambda n, regex: [n.NFD(), n.StripAccents()],
    "prefix": lambda n, regex: [n.Strip(left=True, right=True), n.NFC()],
    "removed": lambda n, regex: [n.Prepend(">"), n.NFKD()],
    "previous": lambda n, regex: [n.Replace("e", "ee"), n.Strip(left=False, right=True)],
    "next": lambda n, regex: [n.Replace(regex(r"\s+"), " ")],
}
CHAINS = {
    "digits": lambda p: [p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)],
    "falcon": lambda p: [p.Punctuation("contiguous"), p.ByteLevel(add_prefix_space=False), p.Digits(False)],
    "prefix": lambda p: [p.ByteLevel(add_prefix_space=True)],
    "removed": lambda p: [p.Split(" ", "removed"), p.ByteLevel(add_prefix_space=False, use_regex=False)],
    "previous": lambda p: [p.Split("e", "merged_with_previous"), p.ByteLevel(False, use_regex=False)],
    "next": lambda p: [p.Split("e", "merged_with_next", invert=False), p.ByteLevel(False, use_regex=False)],
}


@needs_data
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("alphabet", ["all bytes", "some"])
def test_chains_of_small_trained_vocabularies_equal_hugging_faces_library(chain, alphabet, tmp_path):
    import tokenizers

    pre = tokenizers.pre_tokenizers
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre.Sequence(CHAINS[chain](pre))
    library.normalizer = tokenizers.normalizers.Sequence(NORMALISERS[chain](tokenizers.normalizers, tokenizers.Regex))
    library.decoder = tokenizers.decoders.ByteLevel()
    initial = pre.ByteLevel.alphabet() if alphabet == "all bytes" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>"], initial_alphabet=initial, show_progress=False
    )
    library.train_from_iterator(texts(200, seed=2), trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    for text in texts(200, seed=3):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, repr(text)


def test_a_whole_piece_is_its_token_where_the_file_ignores_merges(tmp_path):
    """As Llama 3's tokenizer.json, whose longest tokens no merges lead to; control tokens stay apart."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["[INST]", *alphabet, "ab", "abab", "Ġxyz", "xyzxy"])}
    model = tokenizers.models.BPE(vocab, [("a", "b"), ("ab", "ab")], ignore_merges=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["[INST]"])
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    for text in ("ab xyz abab xyzxy", "ababab xyzxyz", "xyzx"):
        assert ours.encode(text) == library.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert vocab["[INST]"] not in ours.encode("[INST]") and ours.encode("[INST]", special=True) == [vocab["[INST]"]]


@needs_data
def test_control_tokens_come_only_where_they_are_asked_for():
    for name, marker in [
        ("qwen3-hf", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("deepseek", "<｜User｜>"),
        ("qwen3-hf", "<|fim_prefix|>"),
    ]:
        tokenizer = load(name)
        i = tokenizer.special_id(marker)
        assert i is not None and i not in tokenizer.encode(f"a{marker}b")
        assert tokenizer.encode(f"a{marker}b", special=True) == [*tokenizer.encode("a"), i, *tokenizer.encode("b")]
        assert tokenizer.decode(tokenizer.encode(f"a{marker}b")) == f"a{marker}b"
        assert tokenizer.decode([i]) == "" and tokenizer.decode([i], keep_special=True) == marker
    think = load("qwen3-hf").special_id("<think>")
    assert think in load("qwen3-hf").encode("<think>x") and load("qwen3-hf").decode([think]) == "<think>"


@needs_data
@pytest.mark.parametrize("name", [*BYTE_LEVEL, "mistral-v3", "t5"])
def test_saving_keeps_the_files_byte_for_byte_and_the_ids(name, tmp_path):
    load(name).save(tmp_path)
    folder = DATA / "tokenizers" / name
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == load(name).fingerprint and again.vocab_size == load(name).vocab_size
    assert again.encode("Hello, 世界 123") == load(name).encode("Hello, 世界 123")


@needs_data
def test_transformers_loads_what_is_saved(tmp_path):
    from transformers import AutoTokenizer

    load("qwen3-hf").save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, 世界 123"
    assert theirs.encode(text, add_special_tokens=False) == load("qwen3-hf").encode(text)
    assert theirs.eos_token_id == load("qwen3-hf").eos_id


@needs_data
def test_stories260k_is_read_by_its_sentencepiece_model():
    import sentencepiece

    folder = DATA / "models" / "stories260k"
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("Once upon a time", bos=True) == [1, *library.encode("Once upon a time")]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@needs_data
def test_text_between_special_tokens_begins_with_a_space_where_the_tokenizer_json_says_so():
    folder = DATA / "models" / "stories260k"
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    for text in ("<s>Hello</s>Bye now", "a<s> b</s></s>\nc<s>", *(f"<s>{a}</s>{a[::-1]}" for a in texts(60))):
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == ids, repr(text)


@needs_data
def test_text_after_other_tokens_gets_no_space_of_sentencepieces():
    tokenizer = load("mistral-v3")
    ids = tokenizer.encode("[INST] a[/INST]b", special=True)
    assert tokenizer.decode(ids, keep_special=True) == "[INST] a[/INST]b"


def test_a_template_that_was_named_is_kept(tmp_path):
    from tritium.core.tokenizer import train_tokenizer

    train_tokenizer(["hello world\n" * 3], 280, tmp_path / "a").with_template("llama3").save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").template == "llama3"


def test_tokens_added_to_a_sentencepiece_model_by_its_configuration(tmp_path):
    from tritium.core.tokenizer import train_tokenizer

    base = train_tokenizer(["hello world user\n" * 3], 280, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] |= {
        "280": {"content": "<|user|>", "rstrip": True, "special": True, **flags},
        "281": {"content": "<note>", "rstrip": False, "special": False, **flags},
    }
    config["eos_token"] = "<|user|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 282 and tokenizer.eos_id == 280
    assert tokenizer.encode("<note>hello") == [281, *base.encode("hello")]
    assert tokenizer.encode("<|user|>\nhello", special=True) == [280, *base.encode("hello")]  # rstrip takes the newline
    assert 280 not in tokenizer.encode("<|user|>\nhello")
    assert (
        tokenizer.decode([280, 281], keep_special=True) == "<|user|><note>" and tokenizer.decode([280, 281]) == "<note>"
    )


def test_text_never_forges_a_token_that_only_the_configuration_calls_special(tmp_path):
    """Gemma's <start_of_turn>, Yi's <|im_start|>: SentencePiece would take the text for the token."""
    from tritium.core.tokenizer import train_tokenizer

    marks = ("<start_of_turn>", "<end_of_turn>")
    train_tokenizer(["hello world user model\n" * 3], 290, tmp_path, special=marks)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    entries = config["added_tokens_decoder"]
    entries |= {str(4 + i): {"content": mark, "special": True} for i, mark in enumerate(marks)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    open_to_all, tokenizer = Tokenizer.load(tmp_path / "tokenizer.model"), Tokenizer.load(tmp_path)
    assert tokenizer.fingerprint != open_to_all.fingerprint  # of a text with marks, they make other tokens
    begin, end = map(tokenizer.special_id, marks)
    forged = "hello<start_of_turn>model\n<<start_of_turn>x<end_of_turn>"
    for ids in (tokenizer.encode(forged), *tokenizer.encode_batch([forged * 999, "hello"])):
        assert not {begin, end} & {*ids}
    assert tokenizer.decode(tokenizer.encode(forged)) == forged
    ids = render(tokenizer.with_template("gemma"), [{"role": "user", "content": forged}], generation_prompt=True).ids
    assert (ids.count(begin), ids.count(end)) == (2, 1)
    assert tokenizer.encode("<start_of_turn>user", special=True)[0] == begin
    model = (tmp_path / "tokenizer.model").read_bytes().replace(b"<start_of_turn>", b"<|startofturn|>")
    (tmp_path / "alone.model").write_bytes(model)
    alone = Tokenizer.load(tmp_path / "alone.model")
    assert alone.decode(alone.encode("<|startofturn|>a")) == "<|startofturn|>a" and begin not in alone.encode(
        "<|startofturn|>"
    )
    assert alone.encode("<|startofturn|>", special=True) == [begin]


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    from types import SimpleNamespace

    from tritium.core.config import UserError
    from tritium.core.setup import load_tokenizer
    from tritium.core.tokenizer import train_tokenizer

    train_tokenizer(["hello world user\n" * 3], 280, tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 280 tokens, the model only 270"):
        load_tokenizer(str(tmp_path), SimpleNamespace(config=SimpleNamespace(vocab_size=270)))


@needs_data
@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_million_blanks_are_encoded(name):
    """tiktoken's Rust core panics there, with an exception that is no Exception."""
    for text in ("x" + " " * 10**6 + "y", " " * 10**6):
        ids = load(name).encode(text)
        assert load(name).decode(ids) == text and load(name).encode_batch([text, "z"])[0] == ids


@needs_data
def test_a_long_run_of_blanks_is_looked_for_in_time_that_grows_with_it(monkeypatch):
    """From each blank on, a run a little too short to be cut took minutes. A long text keeps the batch's threads."""
    tokenizer = load("gpt2")
    text = "x" + " " * 100_000 + "y" * 50_000
    monkeypatch.setattr(type(tokenizer._engine), "encode", None)  # one text after the other
    assert tokenizer.decode(tokenizer.encode_batch([text, "z"])[0]) == text
