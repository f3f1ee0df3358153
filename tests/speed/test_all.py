"""The document of all benchmarks: each section stands for itself."""

from prefixcache_bench.speed.all import BENCHMARKS, HEAD, sections_of, written


def test_a_section_is_renewed_and_the_others_stay_as_they_were() -> None:
    first, second = BENCHMARKS[0].title, BENCHMARKS[1].title
    text = written({"Of our own": "c\n", second: "b\n", first: "a\n\n```\n# no title\n```\n"})
    assert text.startswith(HEAD)
    sections = sections_of(text)
    assert list(sections) == [first, second, "Of our own"]
    assert written(sections) == text
    sections[second] = "new\n"
    assert sections_of(written(sections))[first] == "a\n\n```\n# no title\n```\n"
    assert sections_of("") == {}
