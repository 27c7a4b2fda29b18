"""A base that arrives changed: what no TLS protects, another read must tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy
from handmade import TWO_LANES, small_merge
from network_faults import flip

from merge_core.errors import VerificationError
from merge_core.merge import merge
from merge_core.plan import MergePlan
from merge_core.planner import make_plan
from merge_core.stores.location import locate
from merge_core.stores.opening import lacks_tls, open_store
from merge_core.stores.s3 import S3Store


@pytest.fixture
def local(tmp_path: Path) -> MergePlan:
    return small_merge(tmp_path)


@pytest.fixture
def remote(local: MergePlan, s3_store: S3Store) -> MergePlan:
    """The same, from S3 behind the proxy."""
    base = s3_store.location / "base"
    for path in local.base.local.iterdir():
        open_store(base).put(path.name, path.read_bytes())
    adapter = local.adapters[0].path
    return make_plan(base, [adapter], shard_bytes=18_000, access=base.access)


def test_numeric_verification_notices_bytes_that_changed_on_their_way(
    remote: MergePlan, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    # Before the weights, the header is read once more.
    s3_proxy.faults(Fault(flip(-1), method="GET", path=r"/base/model.*safetensors", skip=1))
    with pytest.raises(VerificationError, match=r"model\."):
        merge(remote, tmp_path / "out", level="numeric", choice=TWO_LANES)
    assert sum(one.faulty for one in s3_proxy.seen()) == 1
    assert not (tmp_path / "out" / "config.json").exists()

    merge(remote, tmp_path / "other", level="numeric", choice=TWO_LANES)
    assert (tmp_path / "other" / "config.json").exists()


def test_the_plan_says_that_it_reads_without_tls(local: MergePlan, remote: MergePlan) -> None:
    said = [note for note in remote.notes if "--verify numeric" in note]
    assert [note.partition(":")[0] for note in said] == ["BASE is read over http, without TLS"]
    assert not any("TLS" in note for note in local.notes)


@pytest.mark.parametrize(
    ("address", "lacks"), [("http://10.0.0.1:4443", True), ("https://10.0.0.1", False), ("", False)]
)
def test_a_base_in_gcs_is_read_without_tls_where_its_address_says_so(
    monkeypatch: pytest.MonkeyPatch, address: str, *, lacks: bool
) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", address)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    assert lacks_tls(locate("gs://bucket/base")) is lacks
