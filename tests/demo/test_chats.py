"""The shipped chats are what the demo promises: counts, lengths with the real tokeniser, style."""

import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from prefixcache_worker import smollm2
from prefixcache_worker.demo import chats
from prefixcache_worker.demo.transcript import Transcript


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(smollm2.folder(quiet=True)))


@pytest.fixture(scope="module")
def workload():
    return chats.load()


def test_there_are_at_least_four_assistants_and_24_chats_of_three_turns(workload):
    assert len(workload.assistants) >= 4
    assert len(workload.chats) >= 24
    assert all(len(chat.turns) == 3 for chat in workload.chats)


@pytest.mark.slow  # it imports transformers
def test_system_prompts_have_200_to_1200_tokens_and_one_has_about_1000(workload, tokenizer):
    lengths = [
        len(tokenizer.encode(assistant.system, add_special_tokens=False))
        for assistant in workload.assistants.values()
    ]
    assert all(200 <= length <= 1200 for length in lengths), lengths
    assert any(950 <= length <= 1050 for length in lengths), lengths


def test_chats_are_spread_unevenly_over_all_assistants(workload):
    counts = Counter(chat.assistant.name for chat in workload.chats)
    assert set(counts) == set(workload.assistants)
    assert max(counts.values()) >= 3 * min(counts.values())


def test_no_two_chats_and_no_two_turns_say_the_same(workload):
    assert len({chat.id for chat in workload.chats}) == len(workload.chats)
    turns = [turn.casefold() for chat in workload.chats for turn in chat.turns]
    assert len(set(turns)) == len(turns)
    assert len({a.system for a in workload.assistants.values()}) == len(workload.assistants)


def test_texts_are_finished_sentences_without_placeholders(workload):
    placeholder = re.compile(
        r"\b(lorem|ipsum|todo|tbd|xxx|foo|bar|insert)\b|\.\.\.|<[a-z]+>", re.IGNORECASE
    )
    texts = [turn for chat in workload.chats for turn in chat.turns]
    texts += [assistant.system for assistant in workload.assistants.values()]
    for text in texts:
        assert not placeholder.search(text), text
        assert text == text.strip()
        assert len(text) >= 25
    for text in texts:
        if not re.match(r"def |for ", text):  # code that a reviewer is shown
            assert "  " not in text
            assert text[0].isupper()
            assert text[-1] in ".?!"


def test_a_system_prompt_is_varied_prose_and_not_one_phrase_repeated(workload):
    for assistant in workload.assistants.values():
        sentences = [s.strip() for s in re.split(r"[.\n]", assistant.system) if s.strip()]
        assert len(set(sentences)) == len(sentences)
        words = re.findall(r"[a-z']+", assistant.system.lower())
        assert len(set(words)) > 0.3 * len(words)


def test_the_quick_workload_is_a_part_with_a_long_system_prompt_and_shared_ones(workload):
    quick = workload.quick()
    ids = {chat.id for chat in workload.chats}
    assert all(chat.id in ids and len(chat.turns) == 2 for chat in quick.chats)
    counts = Counter(chat.assistant.name for chat in quick.chats)
    assert len(counts) >= 3
    assert max(counts.values()) >= 3


@pytest.mark.slow
def test_each_prompt_extends_the_one_before_with_the_very_tokens_of_the_answer(workload, tokenizer):
    stop = frozenset({tokenizer.eos_token_id})
    chat = workload.chats[0]
    transcript = Transcript(chat, tokenizer, stop)
    first = transcript.ask(0)
    assert tokenizer.decode(first).endswith("<|im_start|>assistant\n")
    answer = [tokenizer.eos_token_id - 1 + 500, 700, 701, tokenizer.eos_token_id]
    transcript.answer(answer)
    second = transcript.ask(1)
    assert second[: len(first) + 3] == first + answer[:3]
    assert tokenizer.decode(second[len(first) + 3 :]) == (
        f"<|im_end|>\n<|im_start|>user\n{chat.turns[1]}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_the_system_tokens_are_what_chats_of_one_assistant_share(workload, tokenizer):
    same = [chat for chat in workload.chats if chat.assistant.name == "museum"]
    transcripts = [Transcript(chat, tokenizer, frozenset()) for chat in same]
    num_system = transcripts[0].num_system_tokens()
    prompts = [transcript.ask(0) for transcript in transcripts]
    assert all(prompt[:num_system] == prompts[0][:num_system] for prompt in prompts)
    assert len({tuple(prompt[: num_system + 12]) for prompt in prompts}) == len(prompts)
