from prefixcache_worker.demo.compare import Verdict, first_difference
from prefixcache_worker.demo.record import TopTwo

LOGITS = [TopTwo(1, 9.0, 7, 8.0), TopTwo(2, 9.0, 8, 8.9995), TopTwo(3, 9.0, 9, 8.99)]


def test_equal_answers_have_no_difference():
    assert first_difference("a/1", [1, 2, 3], [1, 2, 3], LOGITS) is None


def test_the_second_best_within_a_thousandth_is_a_numerical_tie():
    found = first_difference("a/1", [1, 8, 4], [1, 2, 3], LOGITS, start=5)
    assert found is not None
    assert found.tie
    assert (found.position, found.shared_token, found.unshared_token) == (6, 8, 2)
    assert (found.shared_logit, found.unshared_logit) == (8.9995, 9.0)
    assert "8.999500" in str(found)


def test_the_second_best_further_away_is_a_wrong_answer():
    found = first_difference("a/1", [1, 2, 9], [1, 2, 3], LOGITS)
    assert found is not None
    assert not found.tie
    assert found.shared_logit == 8.99


def test_a_token_that_is_not_among_the_best_is_a_wrong_answer():
    found = first_difference("a/1", [1, 77], [1, 2], LOGITS)
    assert found is not None
    assert not found.tie
    assert found.shared_logit is None
    assert "not among the best" in str(found)


def test_of_three_that_are_equally_good_each_is_a_numerical_tie():
    tops = [TopTwo(1, 9.0, 2, 9.0, ((3, 8.9995), (4, 8.0)))]
    for token, is_tie in ((2, True), (3, True), (4, False), (5, False)):
        found = first_difference("a/1", [token], [1], tops)
        assert found is not None
        assert found.tie is is_tie


def test_an_answer_that_ends_earlier_or_later_is_a_wrong_answer():
    for shared, unshared in ([1], [1, 2]), ([1, 2], [1]):
        found = first_difference("a/1", shared, unshared, LOGITS)
        assert found is not None
        assert not found.tie
        assert found.position == 1


def test_an_unshared_run_without_logits_excuses_nothing():
    found = first_difference("a/1", [8], [2], [])
    assert found is not None
    assert not found.tie


def test_where_bits_are_compared_nothing_is_excused():
    assert first_difference("a/1", [1, 2, 3], [1, 2, 3], LOGITS, bits=LOGITS) is None
    found = first_difference("a/1", [1, 8], [1, 2], LOGITS, bits=LOGITS)
    assert found is not None
    assert not found.tie
    assert not found.only_bits
    for own in ([*LOGITS[:2], TopTwo(3, 9.0, 9, 8.99000001)], LOGITS[:2]):
        found = first_difference("a/1", [1, 2, 3], [1, 2, 3], LOGITS, bits=own, start=4)
        assert found is not None
        assert (found.position, found.only_bits, found.tie) == (6, True, False)
        assert "NOT the bits" in str(found)
    assert not Verdict(1, 3, (found,), of_bits=True).identical


def test_the_verdict_is_identical_with_ties_only_and_never_without_any_comparison():
    tie = first_difference("a/1", [1, 8], [1, 2], LOGITS)
    wrong = first_difference("a/1", [1, 77], [1, 2], LOGITS)
    assert Verdict(3, 9, ()).identical
    assert Verdict(3, 9, (tie,)).identical
    assert Verdict(3, 9, (tie,)).numerical_ties == 1
    assert not Verdict(3, 9, (tie, wrong)).identical
    assert not Verdict(0, 0, ()).identical
