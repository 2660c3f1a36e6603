"""Sampling: which tokens may come, seeds, prompts of different lengths, stop strings, memory."""

from __future__ import annotations

import gc

import pytest
import torch

import recurra
from recurra.lm import ByteTokenizer, LMConfig, Sampling, generate_text
from recurra.lm.generation import _probabilities, _Sampler, _UntilStop, prefill
from recurra.nn import MambaConfig

CONFIG = LMConfig(vocab_size=256, d_model=16, n_layers=2, mixer=MambaConfig(d_state=4))


@pytest.fixture(scope="module")
def lm() -> recurra.LM:
    torch.manual_seed(0)
    model = recurra.LM(CONFIG).double().eval()
    with torch.no_grad():
        model.embeddings.weight.mul_(20)
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (n,), generator=random) for n in lengths]


def test_greedy_takes_the_largest(lm):
    (prompt,) = prompts(5)
    tokens = prompt.tolist()
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(lm(torch.tensor([tokens]))[0][0, -1].argmax()))
    assert lm.generate([prompt], max_tokens=12) == [tokens[5:]]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(seed=4)])
def test_a_batch_is_its_sequences_alone(lm, sampling):
    """Whatever their lengths, and when they end."""
    given = prompts(3, 1, 40, 7)
    together = lm.generate(given, max_tokens=20, sampling=sampling, stop_tokens=range(0, 30))
    assert sampling.temperature == 0 or len({len(tokens) for tokens in together}) > 1
    for row, prompt in enumerate(given):
        seed = None if sampling.seed is None else sampling.seed + row
        one = Sampling(temperature=sampling.temperature, seed=seed)
        alone = lm.generate([prompt], max_tokens=20, sampling=one, stop_tokens=range(0, 30))
        assert alone == [together[row]]


@pytest.mark.parametrize("budget", [1, 3, 5, 16, 1000])
def test_prefill_in_any_chunks(lm, budget):
    given = prompts(3, 1, 40, 7)
    with torch.inference_mode():
        logits, state = prefill(lm, given, budget)
        for row, prompt in enumerate(given):
            alone, last = lm(prompt[None])
            torch.testing.assert_close(logits[row], alone[0, -1], rtol=1e-11, atol=1e-12)
            for mine, theirs in zip(state, last, strict=True):
                torch.testing.assert_close(mine.ssm[row], theirs.ssm[0], rtol=1e-11, atol=1e-13)
                torch.testing.assert_close(mine.conv[row], theirs.conv[0], rtol=1e-11, atol=1e-13)


def test_a_seed_repeats_and_another_does_not(lm):
    (prompt,) = prompts(4)
    draws = [
        lm.generate([prompt], max_tokens=30, sampling=Sampling(seed=seed))[0]
        for seed in (1, 1, 2, None, None)
    ]
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[3] != draws[4]


def test_samples_follow_the_distribution(lm):
    """20,000 draws: each frequency within five standard deviations."""
    rows, draws = 1000, 20
    with torch.no_grad():
        logits = lm(torch.tensor([[65]]))[0][0, -1]
    sampling = Sampling(temperature=2.0, top_k=40)
    counts = torch.zeros(256)
    for seed in range(draws):
        s = Sampling(temperature=2.0, top_k=40, seed=seed * rows)
        for token, *_ in lm.generate([[65]] * rows, max_tokens=1, sampling=s):
            counts[token] += 1
    p = _probabilities(logits[None] / sampling.temperature, 40, 1.0)[0].float()
    n = rows * draws
    assert counts[p == 0].sum() == 0 and (p > 0).sum() == 40
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


def test_top_k_and_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert _probabilities(logits, 2, 1.0)[0].nonzero().flatten().tolist() == [0, 1]
    assert _probabilities(logits, 0, 0.69)[0].nonzero().flatten().tolist() == [0, 1]
    assert _probabilities(logits, 0, 0.71)[0].nonzero().flatten().tolist() == [0, 1, 2]
    # The likeliest token stays however small top_p is.
    assert _probabilities(logits, 0, 1e-6)[0].nonzero().flatten().tolist() == [0]
    assert _probabilities(logits, 9, 1.0)[0].count_nonzero() == 4


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.7},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.8},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 3.0},
    ],
    ids=str,
)
def test_probabilities_are_those_of_transformers(options):
    transformers = pytest.importorskip("transformers")
    random = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 256, generator=random)
    seen = torch.randint(0, 256, (3, 20), generator=random)
    warp = []
    if "repetition_penalty" in options:
        warp.append(transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        warp.append(transformers.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        warp.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warp.append(transformers.TopPLogitsWarper(options["top_p"]))
    wanted = logits
    for one in warp:
        wanted = one(seen, wanted)
    sampler = _Sampler(Sampling(**options, seed=1), 3, 256, torch.device("cpu"))
    for row in range(3):
        sampler.saw(row, seen[row])
    got = sampler.probabilities(logits, [0, 1, 2])
    torch.testing.assert_close(got, wanted.softmax(-1), rtol=1e-5, atol=1e-8)


def test_a_repetition_penalty_counts_prompt_and_new_tokens(lm):
    (prompt,) = prompts(6)
    plain = lm.generate([prompt], max_tokens=30)[0]
    varied = lm.generate(
        [prompt], max_tokens=30, sampling=Sampling(repetition_penalty=100.0, temperature=0.0)
    )[0]
    assert len(set(varied)) == 30 and not set(varied) & set(prompt.tolist())
    assert len(set(plain)) < 30


def test_the_end_of_text_token_ends():
    torch.manual_seed(0)
    config = LMConfig(vocab_size=8, d_model=16, n_layers=1, eos_token_ids=(3, 4))
    model = recurra.LM(config).eval()
    drawn = model.generate([[1]] * 20, max_tokens=50, sampling=Sampling(seed=0))
    assert all(not {3, 4} & set(tokens) for tokens in drawn) and {len(t) for t in drawn} != {50}
    never = model.generate([[1]] * 20, max_tokens=50, sampling=Sampling(seed=0), stop_tokens=())
    assert {len(t) for t in never} == {50}


def test_what_is_wrong_is_named(lm):
    with pytest.raises(ValueError, match="prompt 1 must hold at least one token"):
        lm.generate([[1], []])
    with pytest.raises(ValueError, match="tokens of prompt 0 must be from 0 to 255"):
        lm.generate([[256]])
    with pytest.raises(ValueError, match="temperature must be from 0.0 to 1000.0, got -1"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="top_p must be from 1e-06 to 1.0, got nan"):
        Sampling(top_p=float("nan"))
    assert lm.generate([]) == []
    assert lm.generate([[1]], max_tokens=0) == [[]]


# ---- text ----------------------------------------------------------------------------------------


def test_text_streams_as_it_is_returned(lm):
    parts: list[list[str]] = [[], []]
    texts = generate_text(
        lm,
        ByteTokenizer(),
        ["def", "while True:"],
        max_tokens=60,
        sampling=Sampling(seed=0),
        on_text=lambda row, text: parts[row].append(text),
    )
    assert ["".join(p) for p in parts] == texts and all(len(p) > 5 for p in parts)


def test_a_stop_string_ends_and_is_left_out(lm):
    (text,) = generate_text(lm, ByteTokenizer(), ["a"], max_tokens=60, sampling=Sampling(seed=0))
    at = next(i for i in range(10, 50) if text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    parts: list[str] = []
    (cut,) = generate_text(
        lm,
        ByteTokenizer(),
        ["a"],
        max_tokens=60,
        sampling=Sampling(seed=0),
        stop=["never comes", stop],
        on_text=lambda row, piece: parts.append(piece),
    )
    assert cut == text[:at] == "".join(parts)


@pytest.mark.parametrize("text", ["aab", "aaab", "xaaby", "aa", "ab", "aabaab"])
@pytest.mark.parametrize("stop", [["aab"], ["b", "aab"], ["ba", "aaa"], []])
def test_a_stop_string_in_pieces(text, stop):
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    until, out, stopped = _UntilStop(stop), "", False
    for letter in text:
        piece, stopped = until.push(letter)
        out += piece
        if stopped:
            break
    if not stopped:
        out += until.flush()
    # The one that is complete first ends the text.
    first = min(((text.find(s) + len(s), text.find(s)) for s in stop if s in text), default=None)
    assert stopped == bool(ends)
    assert out == (text if first is None else text[: first[1]])


def test_bytes_of_a_character_appear_together():
    decoder = ByteTokenizer().decoder()
    pieces = [decoder.push(byte) for byte in "aé漢🙂".encode()]
    assert [p for p in pieces if p] == ["a", "é", "漢", "🙂"]
    decoder = ByteTokenizer().decoder()
    assert decoder.push(0xE6) == "" and decoder.push(0x41) == "\ufffdA"
    assert decoder.push(0xF0) == "" and decoder.flush() == "\ufffd"
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aé漢")) == "aé漢"


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([recurra.LM.__doc__] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_streams_what_it_decodes(json_file):
    from recurra.lm.tokenizer import JsonTokenizer

    tokenizer = JsonTokenizer(json_file)
    for text in ("A causal language model", "  two  spaces\n\tand é漢🙂 x", ""):
        tokens = tokenizer.encode(text)
        decoder = tokenizer.decoder()
        pieces = [decoder.push(token) for token in tokens]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(tokens) == text
        assert not any("\ufffd" in p for p in pieces)
    assert tokenizer.token_id("<|endoftext|>") == 0 and tokenizer.token_id("nothing") is None


def test_decoding_takes_constant_memory(lm):
    """As many bytes of tensors live after 30 tokens as after 300."""
    living: dict[int, int] = {}
    count = 0

    def on_token(row: int, token: int) -> None:
        nonlocal count
        count += 1
        if count in (30, 300):
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            living[count] = sum(x.untyped_storage().nbytes() for x in tensors)

    lm.generate([[1]], max_tokens=301, sampling=Sampling(seed=0), on_token=on_token)
    assert living[30] == living[300] > 0


def test_generating_leaves_the_random_numbers_of_others(lm):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    lm.generate([[1]], max_tokens=5)
    lm.generate([[1]], max_tokens=5, sampling=Sampling())
    assert torch.equal(torch.rand(1), wanted)


def test_any_temperature(lm):
    cold = Sampling(temperature=1e-42, seed=0)
    assert lm.generate([[5]], max_tokens=8, sampling=cold) == lm.generate([[5]], max_tokens=8)


def test_spaces_between_the_prompt_and_what_follows(tmp_path):
    """A tokenizer that drops the first space of a text must not drop that of a continuation."""
    from recurra.lm.tokenizer import JsonTokenizer

    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[UNK]", "▁once", "▁upon", "▁a", "▁time"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.enable_truncation(2)
    made.enable_padding(length=7)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("once upon a time") == [1, 2, 3, 4]  # neither cut nor filled up
    decoder = tokenizer.decoder(tokenizer.encode("once upon"))
    assert [decoder.push(3), decoder.push(4)] == [" a", " time"] and decoder.flush() == ""
