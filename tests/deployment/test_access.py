"""What a node, or somebody at a node, cannot do."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.stack import BIN, PORT, SERVER_IP, Stack, stack, wait_for

# Status of each path, by a client that trusts the server's certificate; 0: no answer.
PROBE = """
import http.client, json, ssl, sys
host, port, ca, *paths = sys.argv[1:]
found = {}
for path in paths:
    context = ssl.create_default_context(cafile=ca)
    link = http.client.HTTPSConnection(host, int(port), timeout=5, context=context)
    try:
        link.request("GET" if path == "/health" else "POST", path, b"")
        found[path] = link.getresponse().status
    except OSError:
        found[path] = 0
print(json.dumps(found))
"""
# Stands for a SuperLink that answers every message with an error.
FAILING = """
import http.server, ssl, sys
class Failing(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_error(500)
    def do_GET(self):
        self.send_error(200)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
server = http.server.HTTPServer(("127.0.0.1", 8000), Failing)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
# Stands for a SuperLink that answers what comes in pieces, and never an empty body.
SILENT = """
import http.server, ssl, sys, threading
class Silent(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        size = int(self.headers["Content-Length"])
        if size == 0:
            threading.Event().wait()
        self.rfile.read(size)
        self.do_GET()
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(*sys.argv[1:])
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024
server = Server(("127.0.0.1", 8000), Silent)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
# From one address: N nodes with 4 requests under way each, 40 in a row. Prints how
# often each status came.
NODES = """
import collections, http.client, json, ssl, sys, threading
host, port, ca, nodes = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
found = collections.Counter()
def work():
    link = http.client.HTTPSConnection(host, int(port), context=context)
    for _ in range(40):
        link.request("POST", "/v1/fleet/push-object", b"x" * 100)
        answer = link.getresponse()
        answer.read()
        found[answer.status] += 1
threads = [threading.Thread(target=work) for _ in range(4 * int(nodes))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(found))
"""
# Opens N requests that are never answered, and prints the statuses of the last ones.
FLOOD = """
import json, select, socket, ssl, sys
host, port, ca, number, more = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
ask = b"POST /v1/fleet/x HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 0\\r\\n\\r\\n"
links = []
def request():
    link = context.wrap_socket(socket.create_connection((host, int(port))),
                               server_hostname=host)
    link.sendall(ask)
    links.append(link)
    return link
for _ in range(int(number)):
    request()
late = [request() for _ in range(int(more))]
print(json.dumps([int(link.recv(100).split()[1]) for link in late]))
"""
# Status of a request whose header claims this many bytes of body.
CLAIM = """
import http.client, ssl, sys
host, port, ca, size = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
link = http.client.HTTPSConnection(host, int(port), context=context)
link.putrequest("POST", "/v1/fleet/push-object")
link.putheader("Content-Length", size)
link.endheaders()
print(link.getresponse().status)
"""
CLOSED = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/pull-pending-tasks",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "//v1/control/list-runs",
    "/docs",
    "/",
]


def probe(stack: Stack, port: int, *paths: str) -> dict[str, int]:
    """Return the statuses that a node gets."""
    node = stack.nodes["guest"]
    ca = stack.ca
    answer = node.run(sys.executable, "-c", PROBE, SERVER_IP, port, ca, *paths)
    found: dict[str, int] = json.loads(answer)
    return found


def test_nodes_are_told_to_ask_again_after_an_error(tmp_path: Path) -> None:
    """Flower's SuperNode does so after a 503, and after a 500 never again."""
    with stack(tmp_path) as made:
        made.add_node("guest", register=False)
        key_pair = (made.keys / "superlink" / n for n in ("server.crt", "server.key"))
        made.server.start("superlink", sys.executable, "-c", FAILING, *key_pair)
        made.start_proxy()
        wait_for("proxy", lambda: probe(made, PORT, "/health") == {"/health": 200}, 30)
        path = "/v1/fleet/pull-messages"
        assert probe(made, PORT, path) == {path: 503}


@pytest.fixture
def behind_proxy(tmp_path: Path) -> Iterator[Stack]:
    """Return a guest, and a proxy in front of a server that may never answer."""
    with stack(tmp_path) as made:
        made.add_node("guest", register=False)
        key_pair = (made.keys / "superlink" / n for n in ("server.crt", "server.key"))
        made.server.start("superlink", sys.executable, "-c", SILENT, *key_pair)
        made.start_proxy()
        wait_for("proxy", lambda: probe(made, PORT, "/health") == {"/health": 200}, 30)
        yield made


def guest_runs(stack: Stack, code: str, *arguments: object) -> str:
    """Return what a program at the guest prints."""
    where = SERVER_IP, PORT, stack.ca
    return stack.nodes["guest"].run(sys.executable, "-c", code, *where, *arguments)


def test_nodes_behind_one_address_are_not_sent_away(behind_proxy: Stack) -> None:
    """Sixteen sites behind a hospital's gateway, all of them busy at once."""
    assert json.loads(guest_runs(behind_proxy, NODES, 16)) == {"200": 16 * 4 * 40}


def test_one_address_does_not_get_all_connections(behind_proxy: Stack) -> None:
    statuses = json.loads(guest_runs(behind_proxy, FLOOD, 512, 3))
    assert statuses == [503, 503, 503]


def test_body_that_no_node_sends_is_refused_unread(behind_proxy: Stack) -> None:
    assert guest_runs(behind_proxy, CLAIM, 33 * 2**20).strip() == "413"


def test_nodes_reach_the_fleet_api_only(server: Stack) -> None:
    guest = server.add_node("guest", register=False)
    open_paths = probe(server, PORT, "/health", "/v1/fleet/pull-messages")
    assert open_paths["/health"] == 200
    # It passes the proxy; the SuperLink refuses what is no message.
    assert open_paths["/v1/fleet/pull-messages"] not in (0, 200, 404)
    assert set(probe(server, PORT, *CLOSED).values()) == {404}
    # The SuperLink itself listens on its own loopback only.
    assert set(probe(server, 8000, "/health", *CLOSED).values()) == {0}

    # A SuperExec at a node, without the secret, gets nowhere; at the server neither.
    (guest.folder / "secret").write_text("0" * 64)
    for machine, address in (
        (guest, f"{SERVER_IP}:{PORT}"),
        (server.server, "127.0.0.1:8000"),
    ):
        machine.start(
            *("intruder", BIN / "flower-superexec"),
            *("--root-certificates", server.ca),
            *("--runtime-api-address", address),
            *("--superexec-auth-secret-file", guest.folder / "secret"),
        )
    wait_for(
        "refusal of the intruders",
        lambda: (
            "404 Not Found" in guest.log("intruder")
            and '/v1/runtime/acquire-task HTTP/1.1" 401'
            in server.server.log("superlink")
        ),
        300,
    )


def test_unregistered_key_and_wrong_ca_are_refused_with_the_reason(
    server: Stack, tmp_path: Path
) -> None:
    stranger = server.add_node("stranger", register=False)
    server.start_node("stranger", tmp_path)
    misled = server.add_node("misled")
    other = tmp_path / "other"
    server._run(server.make_keys, "server", other, SERVER_IP)
    server.start_node("misled", tmp_path, ca=other / "trust" / "ca.crt")
    wait_for(
        "refusal of the key", lambda: "code: 2004" in stranger.log("supernode"), 300
    )
    wait_for(
        "refusal of the certificate",
        lambda: "certificate that is not accepted" in misled.log("supernode"),
        300,
    )
    listed = server.flwr("supernode", "list", "server", "--format", "json")
    states = [node["status"] for node in json.loads(listed)["nodes"]]
    assert len(states) == 1 and "online" not in states  # the one that is registered


def test_second_registration_says_so(server: Stack) -> None:
    server.add_node("twin")
    assert "twin: was registered before, node " in server.register("twin")
