"""A TCP proxy on the loopback that can go away for a while, as a database server does."""

import socket
import threading
from contextlib import suppress


class Proxy:
    def __init__(self, host, port):
        self.target = (host, port)
        self.server = None
        self.port = 0
        self.lines = []
        self.restore()

    def restore(self):
        """Listen, at first on a free port and then on the same again."""
        self.server = socket.create_server(("127.0.0.1", self.port))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()

    def cut(self):
        """Refuse connections and end those there are."""
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for line in self.lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
        self.lines = []

    def _accept(self, server):
        with suppress(OSError):
            while True:
                here, _ = server.accept()
                there = socket.create_connection(self.target)
                self.lines += [here, there]
                threading.Thread(target=self._pump, args=(here, there), daemon=True).start()
                threading.Thread(target=self._pump, args=(there, here), daemon=True).start()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
