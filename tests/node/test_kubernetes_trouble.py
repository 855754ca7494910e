"""The list and watch of all Nodes, from an API server that does what real ones do now and then."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent.kubernetes import Api, ApiError
from tests.node.api.followers import Following, numbered
from tests.node.api.server import ApiServer
from tests.node.machine import run


def test_a_forgotten_version_leads_to_a_new_list(server: ApiServer, following: Following) -> None:
    """If the server has forgotten where the watch ended (410), the list is read again: what went meanwhile, goes."""
    server.stop()
    server.objects.delete("node-000")
    server.objects.put(numbered(9))
    server.objects.compact()
    server.start()
    following.wait_until_known("node-001", "node-002", "node-009")
    assert len(server.requests("LIST")) == 2
    server.objects.put(numbered(10))
    following.wait_until_known("node-001", "node-002", "node-009", "node-010")


def test_a_list_that_expires_between_its_pages(server: ApiServer) -> None:
    """A list whose next page the server has forgotten (410) begins anew: no report is made of half of it."""
    server.objects.put(*(numbered(number) for number in range(150)))
    continued: list[dict[str, str]] = []

    def compact_once(_verb: str, query: dict[str, str]) -> None:
        if "continue" in query and not continued:
            continued.append(query)
            server.objects.compact()

    server.faults.before = compact_once
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_for(lambda: it.nodes, "a report")
    assert {len(report) for report in it.reports} == {150}
    assert [each.status for each in server.requests("LIST")] == [200, 410, 200, 200]
    it.source.stop()


@pytest.mark.parametrize("bytes_before", [0, 300, 1200])
def test_a_watch_cut_in_mid_object(server: ApiServer, following: Following, bytes_before: int) -> None:
    """A connection that breaks within an object costs nothing: that object comes with the next watch."""
    server.faults.cuts.append(bytes_before)
    server.break_watches()
    following.wait_for(lambda: not server.faults.cuts, "the watch that will be cut")
    server.objects.put(numbered(7), numbered(8))
    following.wait_until_known("node-000", "node-001", "node-002", "node-007", "node-008")
    assert len(server.requests("LIST")) == 1


def test_a_list_cut_in_mid_object(server: ApiServer) -> None:
    """A list that breaks off is read again from its first page."""
    server.faults.cuts.append(1000)
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_until_known("node-000", "node-001", "node-002")
    assert {len(report) for report in it.reports} == {3}
    it.source.stop()


@pytest.mark.parametrize("code", [307, 429, 500])
def test_an_unwell_server(server: ApiServer, code: int) -> None:
    """Failures of the server, or of a proxy, are waited out, before the first list as well as later, and told of."""
    server.faults.refusals.extend([code] * 2)
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_for(lambda: str(code) in it.source.trouble, "the trouble")
    assert "etcdserver: leader changed" in it.source.trouble
    it.wait_until_known("node-000", "node-001", "node-002")
    it.wait_for(lambda: not it.source.trouble, "the watch")
    server.faults.refusals.append(code)
    server.break_watches()
    server.objects.put(numbered(7))
    it.wait_until_known("node-000", "node-001", "node-002", "node-007")
    assert len([each for each in server.requests("LIST") if each.status == 200]) == 1
    it.source.stop()


def test_a_watch_that_fails_by_and_by(server: ApiServer, following: Following) -> None:
    """A watch that began well and ends by an error (other than 410) is told of, and goes on where it was."""
    server.faults.errors.append(500)
    server.break_watches()
    following.wait_for(lambda: "500 etcdserver: leader changed" in following.source.trouble, "the trouble")
    server.objects.put(numbered(7))
    following.wait_until_known("node-000", "node-001", "node-002", "node-007")
    assert len(server.requests("LIST")) == 1
    assert not following.source.trouble


def test_a_server_that_goes_without_a_word_is_found_out(server: ApiServer, following: Following) -> None:
    """The kernel asks after the other end of a watch that is silent."""
    following.wait_for(lambda: server.watches, "the watch")
    port = server.url.rpartition(":")[2]
    sockets = run("ss", "-tnoH", "state", "established", f"dport = :{port}").stdout.splitlines()
    assert sockets
    assert all("timer:(keepalive," in each for each in sockets), sockets


def test_a_slow_server(server: ApiServer) -> None:
    """A server that dribbles its answers is slow, no more."""
    server.faults.pause = 0.01
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_until_known("node-000", "node-001", "node-002")
    server.objects.put(numbered(7))
    it.wait_until_known("node-000", "node-001", "node-002", "node-007")
    it.source.stop()


def test_an_outage(server: ApiServer, following: Following) -> None:
    """While the API server is away all stays as it was; when it is back, the watch goes on."""
    reports = len(following.reports)
    server.stop()
    following.wait_for(lambda: following.source.trouble, "the outage")
    server.objects.put(numbered(7))
    threading.Event().wait(1)
    assert len(following.reports) == reports
    server.start()
    following.wait_until_known("node-000", "node-001", "node-002", "node-007")
    assert len(server.requests("LIST")) == 1


@pytest.mark.parametrize("kind", ["kubeconfig", "service account"])
def test_a_token_is_rotated(server: ApiServer, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """An expired token (401) is read again from its file, as kubelet has renewed it."""
    host, port = server.url.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    account, kubeconfig = server.write_service_account(), server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig) if kind == "kubeconfig" else Api(None, account))
    it.wait_until_known("node-000", "node-001", "node-002")
    server.tokens = {"token-2"}
    server.break_watches()
    it.wait_for(lambda: any(each.status == 401 for each in server.seen), "a refused token")
    server.write_token("token-2")
    server.objects.put(numbered(7))
    it.wait_until_known("node-000", "node-001", "node-002", "node-007")
    assert len(server.requests("LIST")) == 1
    it.source.stop()


def test_a_token_is_rotated_while_a_connection_is_used(server: ApiServer) -> None:
    """A request whose token the server no longer takes is sent again with the new one, at once."""
    kubeconfig = server.write_kubeconfig()
    with Api(kubeconfig) as api:
        api.get("/api/v1/nodes", {})
        server.tokens = {"token-2"}
        server.write_token("token-2")
        api.get("/api/v1/nodes", {})
    assert [each.status for each in server.seen] == [200, 401, 200]


@pytest.mark.parametrize("verb", ["LIST", "WATCH"])
def test_a_missing_permission(server: ApiServer, verb: str) -> None:
    """Without the right to list or to watch, the trouble names it; once it is granted, the cluster is followed."""
    server.rules.discard((verb, "nodes"))
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_for(lambda: f"cannot {verb.lower()}" in it.source.trouble, "the trouble")
    server.rules.add((verb, "nodes"))
    it.wait_until_known("node-000", "node-001", "node-002")
    it.wait_for(lambda: not it.source.trouble, "the watch")
    it.source.stop()


def test_without_credentials(server: ApiServer, tmp_path: Path) -> None:
    """A missing kubeconfig is trouble that is told and tried again, until it is there."""
    path = tmp_path / "kubeconfig"
    it = Following(lambda: Api(path))
    it.wait_for(lambda: f"{path} not found" in it.source.trouble, "the trouble")
    assert server.write_kubeconfig(token_file=False) == path
    it.wait_until_known("node-000", "node-001", "node-002")
    it.source.stop()


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", "users: 1", "{", "clusters: []\ncontexts: []\ncurrent-context: a\nusers: []"],
)
def test_a_bad_kubeconfig(tmp_path: Path, text: str) -> None:
    """A file that is no kubeconfig, such as one that is being written, is trouble as any other, in our own words."""
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ApiError, match="read the credentials"):
        Api(path)


def test_a_server_that_is_not_the_clusters(server: ApiServer, tmp_path: Path) -> None:
    """A server whose certificate the cluster's authority has not signed is asked nothing."""
    (tmp_path / "other").mkdir()
    other = ApiServer(tmp_path / "other").write_kubeconfig()
    kubeconfig = server.write_kubeconfig()
    text = kubeconfig.read_text()
    authority = "certificate-authority-data: "
    foreign = other.read_text().split(authority)[1].split("\n")[0]
    kubeconfig.write_text(text.replace(text.split(authority)[1].split("\n")[0], foreign))
    it = Following(lambda: Api(kubeconfig))
    it.wait_for(lambda: "certificate" in it.source.trouble.lower(), "the trouble")
    assert server.seen == []
    it.source.stop()
