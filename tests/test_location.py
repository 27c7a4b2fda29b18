"""What is taken for a path, a bucket or a model on the hub, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from handmade import TWO_LANES, published

from cluster.driver import merge_on_ray
from cluster.workers import ClusterOptions
from merge_core.errors import InputError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.stores.location import (
    Access,
    Location,
    is_bare_hub_id,
    locate,
    locate_model,
    locate_out,
)
from merge_core.stores.opening import open_store


def there(*paths: str) -> Callable[[str], bool]:
    return lambda path: path in paths


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("/models/base", Location(scheme="file", path="/models/base")),
        ("file:///models/base", Location(scheme="file", path="/models/base")),
        ("s3://bucket/a//b/", Location(scheme="s3", root="bucket", path="a/b")),
        ("gs://bucket", Location(scheme="gs", root="bucket")),
        ("hf://org/name@v1/sub", Location(scheme="hf", root="org/name", path="sub", revision="v1")),
        ("org/name", Location(scheme="hf", root="org/name")),
        ("org/name@1234abc", Location(scheme="hf", root="org/name", revision="1234abc")),
    ],
)
def test_what_is_meant(text: str, meant: Location) -> None:
    assert locate(text, exists=there()) == meant
    assert locate(str(meant), exists=there()) == meant


@pytest.mark.parametrize("text", ["org/name", "./org/name", "name", "a/b/c", "../org/name"])
def test_what_could_be_a_path_is_one(text: str) -> None:
    found = locate(text, exists=there("org"))
    assert found.is_local
    assert found.local == Path(text).absolute()
    assert not is_bare_hub_id(text, exists=there("org"))


def test_out_is_a_path_though_nothing_is_there_yet() -> None:
    assert locate_out("results/new").local == Path("results/new").absolute()
    assert locate_out("s3://bucket/a") == locate("s3://bucket/a")
    assert locate_out("hf://org/name").scheme == "hf"  # which a merge refuses by that name


def test_access_is_kept_whatever_it_is() -> None:
    access = Access(endpoint_url="http://127.0.0.1:1")
    places = [locate(text, access) for text in ("/a", "s3://bucket/a", "hf://org/a")]
    assert {place.access for place in places} == {access}
    assert (places[1] / "b").parent == places[1]


def test_an_endpoint_of_s3_is_not_passed_over_for_gcs() -> None:
    with pytest.raises(InputError, match=r"gs://bucket/a: .*GOOGLE_BASE_URL.*AWS_ENDPOINT_URL"):
        locate("gs://bucket/a", Access(endpoint_url="http://127.0.0.1:1"))
    assert locate("gs://bucket/a", Access(anonymous=True)).access.anonymous


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ftp://host/a", "raymeld knows no ftp://"),
        ("s3://key:secret@bucket/a", "holds credentials"),
        ("s3://bucket/a?X-Amz-Signature=abc", "holds credentials"),
        ("s3://bucket/../a", "'.' or '..' in its key"),
        ("s3:///a", "'' is no bucket"),
        ("hf://org", "is no model on the hub"),
        ("hf://somebody:secret@org/a", "holds credentials"),
        ("hf://secret@org/a/b", "holds credentials"),
        ("hf://org/a/b?token=secret", "holds credentials"),
        ("file://host/a", "names another machine"),
    ],
)
def test_what_means_nothing_is_refused(text: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as refused:
        locate(text)
    assert "secret" not in str(refused.value)
    assert "abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("me/merge",), "hf://me/merge"),
        (("hf://me/merge",), "hf://me/merge"),
        (("me/merge@trial",), "hf://me/merge@trial"),
        (("HF://me/merge@refs/pr/1",), "hf://me/merge@refs/pr/1"),
        (("me/merge", "feature/two"), "hf://me/merge@feature/two"),
        (("hf://me/merge@trial", "trial"), "hf://me/merge@trial"),
    ],
)
def test_a_model_to_push_to_is_written_as_anywhere(words: tuple[str, ...], wanted: str) -> None:
    assert str(locate_model(*words)) == wanted


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("merge",), "merge: is no model on the hub. Write org/name"),
        (("me@main",), "me@main: is no model on the hub"),
        (("me/merge/folder",), "is no model on the hub"),
        (("s3://bucket/key",), "is no model on the hub"),
        (("/me/merge",), "is no model on the hub"),
        (("me/my--merge",), "is no model on the hub"),
        (("me/merge.git",), "is no model on the hub"),
        (("me/merge.",), "is no model on the hub"),
        (("me/merge@",), "is no model on the hub"),
        (("me/merge@main", "trial"), "names another branch than --revision trial"),
        (("https://me:secret@huggingface.co/me/merge",), "holds credentials"),
    ],
)
def test_what_is_no_model_to_push_to_is_refused(words: tuple[str, ...], what: str) -> None:
    with pytest.raises(InputError, match=what) as refused:
        locate_model(*words)
    assert "secret" not in str(refused.value)


def test_a_result_in_memory_is_that_on_disk_and_is_refused_on_ray(
    small: MergePlan, out: Path
) -> None:
    merge(small, out, choice=TWO_LANES)
    result = locate("memory://results/one")
    merge(small, result, choice=TWO_LANES)
    store = open_store(result)
    names = [listed.name for listed in store.list() if not listed.name.startswith(".")]
    assert {name: store.get(name) for name in names} == published(out)

    options = ClusterOptions(address="local")
    with pytest.raises(InputError, match="memory of this process alone"):
        merge_on_ray(small, result, options, watch=lambda _: None, say=lambda _: None)
