# SPDX-License-Identifier: MIT
"""Tests of msmtpd.py, in the order of its manual and of RFC 5321: run `python3 -m unittest`.

They need nothing but Python and a POSIX system, listen on free ports of 127.0.0.1 only, and skip
by name where a program that they talk to is missing. They ask for behaviour by what the manual,
README and help() promise, and reach for no name with an underscore.
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import copy
import doctest
import email
import email.policy
import email.utils
import errno
import faulthandler
import fcntl
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import logging
import mailbox
import multiprocessing
import os
import pickle
import platform
import pty
import pwd
import pydoc
import random
import re
import resource
import select
import shlex
import shutil
import signal
import smtplib
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unittest
import warnings
from unittest import mock

import msmtpd

# What some Pythons lack is not needed for the rest.
try:
    import ctypes
except ImportError:
    ctypes = None
try:
    import ssl
except ImportError:
    ssl = None

HERE = os.path.dirname(os.path.abspath(msmtpd.__file__))
PROGRAM = os.path.join(HERE, "msmtpd.py")
PATIENCE = 20       # seconds that a test waits for what should come at once
HANGS = 120         # seconds after which a test that hangs is ended, with the stacks of all threads


def has_ipv6():
    """Whether this system can listen on ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except (AttributeError, OSError):
        return False
    return True


needs_ipv6 = unittest.skipUnless(has_ipv6(), "no IPv6")


# What the tests share

def wait_for(condition, what="the condition"):
    """Wait until `condition()` is true and return its value; look often, so no time is lost."""
    end = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("waited in vain for " + what)
        time.sleep(0.001)


def at_once(function, arguments):
    """Call `function` with each of the arguments in a thread of its own; return the results.

    So that what has to wait waits at the same time.
    """
    arguments = list(arguments)
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))


class Client:
    """A raw client: sends bytes, reads lines."""

    def __init__(self, server, source=None):
        address = server if isinstance(server, tuple) else (server.host, server.port)
        self.socket = socket.create_connection(address, PATIENCE, source)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def send(self, data):
        self.socket.sendall(data.encode() if isinstance(data, str) else data)

    def line(self):
        """The next line without its end, None at the end of the input."""
        line = self.file.readline()
        return line.decode().rstrip("\r\n") if line else None

    def reply(self):
        """The lines of the next reply."""
        lines = []
        while not lines or lines[-1][3:4] == "-":
            line = self.line()
            if line is None:
                break
            lines.append(line)
        return lines

    def do(self, *lines):
        """Send lines one by one, and return the first line of the reply to the last."""
        for line in lines:
            self.send(line + "\r\n")
            reply = self.reply()
        return reply[0] if reply else None

    def open(self, *lines):
        """Read the greeting, say EHLO, and send further lines."""
        self.reply()
        return self.do("EHLO client.example", *lines)

    def data(self):
        """Go as far as the mail data."""
        return self.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")

    def rest(self):
        """What comes up to the end of the input."""
        with contextlib.suppress(ConnectionError):
            return self.file.read().decode()

    def reset(self):
        """Close the connection as a crash does, with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()


def transcript(text):
    """Split a dialogue into ("C" or "S", line) pairs."""
    return [(line[0], line[3:]) for line in textwrap.dedent(text).strip().splitlines()]


def unescape(line):
    return line.encode("utf-8").decode("unicode_escape").encode("latin-1")


def without_trace(data):
    """Mail data without its Received line."""
    return re.sub(rb"\AReceived: .*\n(\t.*\n)*", b"", data)


def vars_of(mail):
    """What two runs of a dialogue have in common: all but the time."""
    return (mail.sender, mail.recipients, without_trace(mail.data), mail.helo, mail.user, mail.tls)


class Case(unittest.TestCase):
    """What all tests have: limits of the module to set, a folder, and an end for what hangs."""

    def setUp(self):
        faulthandler.dump_traceback_later(HANGS, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)

    def limit(self, **constants):
        """Set limits of the module, which are public, for this test."""
        for name, value in constants.items():
            assert name.isupper() and not name.startswith("_")
            patcher = mock.patch.object(msmtpd, name, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def new_folder(self):
        folder = tempfile.mkdtemp(prefix="msmtpd-test-")
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        return folder


class ServerCase(Case):
    """Tests with a server in this process, whose mails end up in self.mails."""

    def serve(self, deliver=None, **options):
        self.mails = []
        server = msmtpd.Server(deliver or self.mails.append, **options)
        server.start()
        self.addCleanup(server.stop)
        return server

    def client(self, server):
        client = Client(server)
        self.addCleanup(client.close)
        return client

    def send_one(self, server, data="Subject: hi\r\n\r\nhi\r\n", sender="a@example.org",
                 recipients=("b@example.org",)):
        """Send one mail as a program would, by smtplib; what is refused raises."""
        with smtplib.SMTP(server.host, server.port, "client.example", PATIENCE) as client:
            return client.sendmail(sender, recipients, data)

    def check_dialogue(self, text, **options):
        """Hold a dialogue whole, byte by byte and in one piece; return the mails of each.

        Lines of the server's are compared as far as they go in `text`. The server has to close
        the connection at the end, having said no more.
        """
        lines = transcript(text)
        all_mails = []
        for way in ("whole", "byte by byte", "in one piece"):
            with self.subTest(way=way):
                server = self.serve(**options)
                with Client(server) as client:
                    self.hold(client, lines, way)
                server.stop()
                all_mails.append(self.mails)
        for mails in all_mails[1:]:
            self.assertEqual([vars_of(mail) for mail in mails],
                             [vars_of(mail) for mail in all_mails[0]])
        return all_mails[0]

    def hold(self, client, lines, way):
        if way == "in one piece":
            client.send(b"".join(unescape(line) + b"\r\n" for who, line in lines if who == "C"))
        for who, line in lines:
            if who == "S":
                self.assertEqual(client.line()[:len(line)], line)
            elif way == "whole":
                client.send(unescape(line) + b"\r\n")
            elif way == "byte by byte":
                for byte in unescape(line) + b"\r\n":
                    client.send(bytes([byte]))
        self.assertEqual(client.rest(), "")


CAPTURE = """\
#!/bin/sh
# Keeps a mail and its arguments in files numbered in order of arrival.
cd "$(dirname "$0")/mails" || exit 75
number=1
until mkdir $number 2>/dev/null; do number=$((number + 1)); done
for argument; do printf '%s\\n' "$argument"; done > $number/arguments
cat > $number/data && mv $number/data $number/mail
"""


class ProgramCase(Case):
    """Tests with the program as a process, and a command that keeps the mails in files."""

    real = False        # whether `start` and `run_program` start a Python of their own

    def setUp(self):
        super().setUp()
        self.folder = self.new_folder()
        os.mkdir(os.path.join(self.folder, "mails"))
        self.capture = self.script("capture", CAPTURE)
        self.log = os.path.join(self.folder, "log")

    def path(self, name):
        return os.path.join(self.folder, name)

    def script(self, name, text):
        """Write an executable file and return its path."""
        path = self.path(name)
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(path, 0o755)
        return path

    def popen(self, *arguments, real=None, env=None, limits=None, **popen):
        """Start the program as a process; returns its Popen.

        real: as a Python of its own. Otherwise main() runs in a fork of this process, which starts
        in a tenth of the time, with `limits` set for the constants of the module.
        """
        self.assertFalse(real and limits)
        if self.real if real is None else real:
            process = subprocess.Popen([sys.executable, PROGRAM, *arguments], env=env, **popen)
        else:
            def run():
                os.closerange(3, 1024)      # also the pipe by which Popen waits for exec
                for name, value in (limits or {}).items():
                    setattr(msmtpd, name, value)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                status = 70
                try:
                    status = msmtpd.main(arguments)
                finally:
                    os._exit(status)
            with warnings.catch_warnings():     # of threads, none of which holds a lock here
                warnings.simplefilter("ignore", DeprecationWarning)
                popen.setdefault("restore_signals", False)      # as if Python had just started
                process = subprocess.Popen(["msmtpd"], preexec_fn=run, **popen)
        self.addCleanup(self.end, process)
        return process

    def start(self, *arguments, log=True, **popen):
        """Start a daemon on a free port, wait until it listens, and return its process.

        It gets the attributes host and port. The command is self.capture unless one is given.
        """
        words = []
        if not any(word.startswith("--command") for word in arguments):
            words.append("--command=%s -f %%F --" % self.capture)
        if not any(word.startswith("--port") for word in arguments):
            words.append("--port=0")
        if log:
            words.append("--log=" + self.log)
        popen.setdefault("stderr", subprocess.PIPE)
        process = self.popen(*words, *arguments, stdin=subprocess.DEVNULL, **popen)
        if log:
            process.host, process.port = self.address(process)
        return process

    def address(self, process=None):
        """Where a daemon listens that writes to self.log, once it does."""
        def listening():
            if process and process.poll() is not None:
                raise AssertionError("ended at once: %r" % process.communicate()[1])
            return re.search(r"listening on \[(.*?)\]:(\d+)", self.logged())
        match = wait_for(listening, "the daemon to listen")
        return match.group(1), int(match.group(2))

    @staticmethod
    def end(process):
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()

    def stop(self, process, number=signal.SIGTERM):
        """End a process by a signal; return its exit status and what it wrote to stderr."""
        process.send_signal(number)
        errors = process.communicate(timeout=PATIENCE)[1]
        return process.returncode, errors.decode() if errors else ""

    def run_program(self, *arguments, input=b"", **popen):
        """Run the program to its end; returns subprocess's result."""
        process = self.popen(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, **popen)
        output, errors = process.communicate(input, PATIENCE)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def logged(self):
        """The text of the log."""
        try:
            with open(self.log, encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def delivered(self):
        """The mails that the command got, as (arguments, bytes), in order of arrival."""
        mails = []
        for number in itertools.count(1):
            folder = os.path.join(self.folder, "mails", str(number))
            if not os.path.exists(os.path.join(folder, "mail")):
                return mails
            with open(os.path.join(folder, "arguments"), encoding="utf-8") as arguments, \
                    open(os.path.join(folder, "mail"), "rb") as mail:
                mails.append((arguments.read().splitlines(), mail.read()))

    def send(self, process, body="Subject: hi\r\n\r\nhi\r\n", sender="a@example.org",
             recipients=("b@example.org",)):
        """Send one mail; return the reply to its data."""
        with Client(process) as client:
            client.open("MAIL FROM:<%s>" % sender, *("RCPT TO:<%s>" % r for r in recipients),
                        "DATA")
            return client.do(body.replace("\r\n", "\n").replace("\n", "\r\n") + ".")


# A transaction as far as the mail data.
HEAD = b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"


def dialogue(text):
    """The transcript of lines `verb -> reply` behind the greeting; "|" parts the reply's lines."""
    lines = [line.strip().split(" -> ") for line in text.strip().splitlines()]
    return "S: 220 localhost ESMTP msmtpd\n" + "".join(
        "C: %s\nS: %s\n" % (verb, reply.replace("|", "\nS: ")) for verb, reply in lines)


def send_pieces(client, data, cuts):
    """Send `data` cut at these places."""
    for start, end in zip([0, *cuts], [*cuts, len(data)]):
        client.send(data[start:end])


try:
    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).close()
    PACKETS = socket.SOCK_SEQPACKET
except (AttributeError, OSError):
    PACKETS = socket.SOCK_STREAM        # not quite the same, but has to do


class Packets(Client):
    """A client on a socket that keeps its pieces apart: each is read by itself."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, PACKETS)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(path)
        self.file = self.socket.makefile("rb")


class WireCase(ServerCase):
    """Tests that look at single replies, or decide what is read in one piece."""

    def check(self, client, *pairs):
        """Send the first of each pair as a line, all in one piece; the second begins its reply."""
        lines = [line.encode() if isinstance(line, str) else line for line, _ in pairs]
        client.send(b"\r\n".join(lines) + b"\r\n")
        replies = [(client.reply() or ["none"])[0][:len(begin)] for _, begin in pairs]
        self.assertEqual(list(zip(lines, replies)), list(zip(lines, (begin for _, begin in pairs))))

    def mail(self, client, data, cuts=(), head=HEAD):
        """Send a mail in pieces, its data cut at these places; return it."""
        client.send(head)
        send_pieces(client, data, cuts)
        self.assertEqual([client.reply()[0][:9] for _ in range(4)],
                         ["250 2.1.0", "250 2.1.5", "354 Send ", "250 2.0.0"],
                         (data[:80], cuts))
        mail, = self.mails
        self.mails.clear()
        return mail

    def wait_for_log(self, logs, words):
        wait_for(lambda: words in "\n".join(logs.output), words)

    def serve_packets(self, deliver=None, **options):
        """Start a server for Packets; return the path of its socket."""
        path = os.path.join(self.new_folder(), "socket")
        listener = socket.socket(socket.AF_UNIX, PACKETS)
        listener.bind(path)
        listener.listen(16)
        self.serve(deliver, sockets=[listener], **options)
        return path


# Replies

class Replies(unittest.TestCase):
    """RFC 5321 4.2 and RFC 2034."""

    def test_form(self):
        for reply, expected in (
                (msmtpd.Reply(250, "", "a", "b"), b"250-a\r\n250 b\r\n"),
                (msmtpd.Reply(554, "5.3.0", "a", "b"), b"554-5.3.0 a\r\n554 5.3.0 b\r\n"),
                (msmtpd.Reply(334, "", ""), b"334 \r\n"), (msmtpd.Reply(334, ""), b"334 \r\n"),
                (msmtpd.Reply(451, "4.3.0", "a\r\nb\0\u00fc\t"), b"451 4.3.0 a  b?? \r\n"),
                (msmtpd.Reply(451, "4.3.0", "a\r\n250 b"), b"451 4.3.0 a  250 b\r\n"),
                (msmtpd.Reply(250, "2.0.0", "x" * 1000), b"250 2.0.0 %s\r\n" % (b"x" * 500))):
            self.assertEqual(bytes(reply), expected)


# Grammar

class Paths(WireCase):
    """RFC 5321 4.1.2, and what real clients send."""

    GOOD = (
        "<a@example.org>", " <a@example.org>", "\t<a@example.org>", " \t a@example.org\t",
        "root", "<Postmaster>", "<a@[192.0.2.1]>", "<a@[IPv6:2001:db8::1]>", "<a@[ipv6:::1]>",
        '<"a b"@example.org>', r'<"a\"> b"@example.org>', r'<"a\ \"\\"@c>', '<"a@b"@c>',
        "<.a..b.@example.org>", "<a@my_host>", "<a@xn--bcher-kva.example>", "<a@b.example.>",
        "<root@host->", "<a@b-.example>", "<a@b-.>", "a@b--.c-.", "<a@-b>", "<a@b.-c>",
        "<o'brien+tag@example.org>",
        "<!#$%&'*+/=?^_`{|}~-@example.org>", "<\u00fc@\u00fc.example>", "<a%b.example@c.example>",
        # Joiners, which some scripts need: RFC 5892 A.1 and A.2.
        "<a@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example>",
        "<\u0dc1\u0dca\u200d\u0dbb\u0dd3@\u0915\u094d\u200d>",
        # A source route is dropped.
        "<@a.example,@b.example:c@example.org>", '<@r.example:"a:b"@example.org>',
    )
    FORGIVEN = (        # as some clients send them; the address
        ("< a@b.example>", "a@b.example"), ("<a@b.example >", "a@b.example"),
        ("<\ta@b.example\t>", "a@b.example"), ("< @x.example:a@b >", "a@b"),
        ('< "a b"@c >', '"a b"@c'), ("<a@b.example (Joe)>", "a@b.example"),
        ("<a@b.example(Joe)>", "a@b.example"), ("<a@b.example> (Joe R.)", "a@b.example"),
        ("a@b.example (Joe)", "a@b.example"),
    )
    BAD = (
        "", " ", "<", ">", "<a@b", "a@b>", "<a b@c>", "<a@b c>", "<@example.org>", "<a@>",
        "<a@@b>", "<a@b@c>", "<a@.b>", "<a@.>", "<a@b..c>", "<a@b..>",
        "<-a@b>", "-oQ/tmp", '<"a@b>', '<"a"b@c>', "<a,b@c>", "<a@b>SIZE=1", "<a(comment)@b>",
        "<a\\b@c>", "<a;b@c>", "<<a@b>>", '<"\\"@c>', "<a:b@c>",
        # Blanks and tabs are nowhere within an address, and a comment only behind it.
        "<a\t@b>", "<a@\tb>", '<"a\tb"@c>', "< -a@b>", "(x)", "<(x)>", "(x) <a@b>", "<a@b (x>",
        # A quoted string is a local part only before an @.
        '"c@d.example"', '<"c@d.example">', '""', '<"">', '"a b"', '"a"@',
        # What a source route leaves is an address by itself.
        "<@x.example:a:b@d.example>", "<@x.example,@y.example:a:b@d.example>", "<@x.example:>",
        "<@r.example:-a@b>", "<@x.example:a@b:c@d.example>", "<@x.example,a@b>", "<@:a@b>",
        # An address literal is an address: RFC 5321 4.1.3.
        "<a@[1.2.3]>", "<a@[256.1.1.1]>", "<a@[1.2.3.4>", "<a@[]>", "<a@[::1]>", "<a@[IPv6:]>",
        "<a@[IPv6:1::2::3]>", "<a@[IPv6:1.2.3.4]>", "<a@[x:y]>", "<a@[192.0.2.1].b>",
        # What nobody can see.
        "<a\u2028b@c>", "<a\xa0b@c>", "<a\u202eb@c>", "<a\u200db@c>", "<a@\u200c>",
        "<a@b\u200d.c>", "<\u200c@b>",
    )

    def test_valid_ones(self):
        self.limit(MAX_ERRORS=1000)
        with Client(self.serve()) as client:
            client.open()
            for path in self.GOOD:
                utf8 = "" if path.isascii() else " SMTPUTF8"
                address = re.sub(r"\A<(@[^:]*:)?|>\Z", "", path.strip(" \t"))
                with self.subTest(path):
                    self.check(client, ("MAIL FROM:" + path + utf8, "250"),
                               ("RCPT TO:" + path, "250"), ("DATA", "354"), (".", "250"))
                    self.assertEqual((self.mails[-1].sender, self.mails[-1].recipients),
                                     (address, [address]))

    def test_forgiven_ones(self):
        with Client(self.serve()) as client:
            client.open()
            for path, address in self.FORGIVEN:
                with self.subTest(path):
                    self.check(client, ("MAIL FROM:" + path + " SIZE=3", "250"),
                               ("RCPT TO:" + path, "250"), ("DATA", "354"), (".", "250"))
                    self.assertEqual((self.mails[-1].sender, self.mails[-1].recipients),
                                     (address, [address]))
            self.check(client, ("MAIL FROM:< >", "250"), ("RCPT TO:< >", "501 5.1.3"))

    def test_invalid_ones(self):
        self.limit(MAX_ERRORS=1000)
        with Client(self.serve()) as client:
            client.open()
            for path in self.BAD:
                utf8 = "" if path.isascii() else " SMTPUTF8"
                with self.subTest(path):
                    self.check(client, ("MAIL FROM:" + path + utf8, "501 5.1.7"), ("RSET", "250"),
                               ("MAIL FROM:<a@b> SMTPUTF8", "250"),
                               ("RCPT TO:" + path, "501 5.1.3"), ("RSET", "250"))

    def test_long_ones_take_no_long_time(self):
        paths = ("<" + "a" * 2030, '<"' + "\\a" * 1015, "<a@" + "a-" * 1014 + "<",
                 "<@a," * 507, "<@a.b:" * 338, "<a@" + "a." * 1014 + "<", "<a@[IPv6:" + "1:" * 1000)
        started = time.process_time()
        with Client(self.serve()) as client:
            client.open()
            self.check(client, *(("MAIL FROM:" + path, "501 5.1.7") for path in paths))
        self.assertLess(time.process_time() - started, 1)

    def test_parameters(self):
        self.limit(MAX_ERRORS=1000)
        with Client(self.serve()) as client:
            client.open()
            for text, options in (
                    ("", []), (" SIZE=1", ["SIZE=1"]), ("  size=1 ", ["SIZE=1"]),
                    (" size=1  BODY=8bitmime\tSMTPUTF8\t", ["SIZE=1", "BODY=8bitmime", "SMTPUTF8"]),
                    (" AUTH=<> \t Envid=a+3Db RET=hdrs", ["AUTH=<>", "ENVID=a+3Db", "RET=hdrs"])):
                with self.subTest(text):
                    self.check(client, ("MAIL FROM:<a@b>" + text, "250"),
                               ("RCPT TO:<c@d> NOTIFY=NEVER orcpt=rfc822;A@b", "250"),
                               ("RCPT TO:<e@f>\tNotify=success,failure", "250"), ("DATA", "354"),
                               (".", "250"))
                    self.assertEqual(
                        (self.mails[-1].mail_options, self.mails[-1].rcpt_options),
                        (options, ["NOTIFY=NEVER", "ORCPT=rfc822;A@b", "NOTIFY=success,failure"]))
                    self.assertEqual(self.mails[-1].smtputf8, "SMTPUTF8" in options)
            self.check(client, *(
                ("MAIL FROM:<a@b> " + text, begin) for text, begin in (
                    ("=1", "501 5.5.4"), ("-X=1", "501 5.5.4"), ("SIZE=1 size=2", "501 5.5.4"),
                    ("SIZE=", "501 5.5.4"), ("SIZE=x", "501 5.5.4"), ("BODY=BINARYMIME", "501 5.5"),
                    ("SMTPUTF8=1", "501 5.5.4"), ("NOTIFY=NEVER", "555 5.5.4"),
                    ("HOLDFOR=1", "555 5.5.4"), ("SIZE=67108865", "552 5.3.4"),
                    ("SIZE=" + 20 * "9", "552 5.3.4"), ("SIZE=" + 21 * "9", "501 5.5.4"),
                    ("SIZE=67108864", "250"))),
                ("RCPT TO:<a@b> SIZE=1", "555 5.5.4"), ("RCPT TO:<a@b> NOTIFY=A NOTIFY=A", "501"))


class TraceFields(WireCase):
    """The Received line: RFC 5321 4.4."""

    class Told(msmtpd.Session):
        """Takes the client's word for where it is, whether in TLS, and as whom."""

        def do_NOOP(self, argument):
            host, tls, user = argument.split(",")
            self.peer, self.tls, self.user = msmtpd.Peer(host, 25), bool(tls), user or None
            return super().do_NOOP(argument)

    def head(self, client, told, greeting, parameters=b""):
        """Send a mail; return the line, without its date."""
        self.check(client, ("NOOP " + told, "250"), (greeting, "250"),
                   (b"MAIL FROM:<a@b>" + parameters, "250"), ("RCPT TO:<c@d>", "250"),
                   ("DATA", "354"), (".", "250"))
        return re.fullmatch(rb"((?:.*\n\t)+).*\n", self.mails[-1].data).group(1).decode()

    def test_names_and_addresses(self):
        with Client(self.serve(received=True, session=self.Told)) as client:
            client.reply()
            for host, shown in (("192.0.2.1", " ([192.0.2.1])"), ("", ""),
                                ("fe80::1%eth0", " ([IPv6:fe80::1])")):
                self.assertEqual(
                    self.head(client, host + ",,", "EHLO a.example"),
                    "Received: from a.example%s\n\tby localhost (msmtpd) with ESMTP;\n\t" % shown)
            for name, shown in (
                    (b"my_pc", "my_pc"), (b"[192.0.2.1]", "[192.0.2.1]"),
                    (b"[IPv6:::1]", "[IPv6:::1]"), (b"", "unknown"), (b"a b", "invalid"),
                    (b"a(b)", "invalid"), (b"\xc3\xbc", "invalid"), (b"a" * 256, "invalid"),
                    # Bytes that are not UTF-8 are Latin-1, or as good as that.
                    (b"M\xdcLLER-PC", "invalid"), (b"\xcf\xca-1", "invalid"), (b"\x80", "invalid")):
                for verb in b"HELO ", b"EHLO ":
                    with self.subTest(verb + name):
                        self.assertRegex(self.head(client, ",,", verb + name),
                                         r"\AReceived: from %s\n" % re.escape(shown))
                        self.assertEqual(self.mails[-1].helo, name.decode(
                            "utf-8" if name == b"\xc3\xbc" else "latin-1"))

    def test_a_line_of_mbox_does_not_end_the_header(self):
        """Patches of git and mails of cron begin with one; behind a field no server takes it."""
        with Packets(self.serve_packets(received=True)) as client:
            client.open()
            for line, kept in ((b"From a@b Mon Sep 17", b"X-Mailbox-Line: From a@b Mon Sep 17"),
                               (b">From a@b", b"X-Mailbox-Line: >From a@b"),
                               (b"From: a@b", b"From: a@b"), (b"Fro", b"Fro"), (b"", b"")):
                data = line + b"\r\nSubject: x\r\n.\r\n"
                for cuts in ((), range(1, 9), *((place,) for place in range(1, 9))):
                    mail = self.mail(client, data, cuts)
                    self.assertEqual(mail.data.split(b"\n", 3)[3], kept + b"\nSubject: x\n", cuts)

    def test_protocols_are_registered_ones(self):
        """RFC 3848 and RFC 6531 4.3; clients say HELO even after AUTH or within TLS."""
        with Client(self.serve(received=True, session=self.Told)) as client:
            client.reply()
            for name in ("SMTP", "ESMTP", "ESMTPA", "ESMTPS", "ESMTPSA", "UTF8SMTP", "UTF8SMTPA",
                         "UTF8SMTPS", "UTF8SMTPSA"):
                told = ",tls" if name.endswith(("S", "SA")) else ","
                told += ",joe" if name.endswith("A") else ","
                utf8 = b" SMTPUTF8" if name.startswith("UTF8") else b""
                for verb in {"SMTP": ["HELO"], "ESMTP": ["EHLO"]}.get(name, ["HELO", "EHLO"]):
                    with self.subTest(name, verb=verb):
                        self.assertIn(" with %s;\n" % name,
                                      self.head(client, told, verb + " x", utf8))

    def test_date_is_rfc_5322_in_local_time(self):
        self.addCleanup(time.tzset)
        for zone, shown in (("UTC0", "+0000"), ("XXX-5:30", "+0530"), ("XXX3:30", "-0330")):
            with mock.patch.dict(os.environ, TZ=zone), \
                    Client(self.serve(received=True)) as client:
                time.tzset()
                before = int(time.time())
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", ".")
                date = self.mails[0].message["Received"].rpartition(";")[2].strip()
                self.assertRegex(date, r"\A[A-Z][a-z]{2}, \d{1,2} [A-Z][a-z]{2} \d{4} "
                                       r"\d\d:\d\d:\d\d \%s\Z" % shown)
                then = email.utils.parsedate_to_datetime(date)
                self.assertTrue(before <= then.timestamp() <= time.time())
                self.assertEqual(date[:3], then.strftime("%a"))


# The dialogue

class Dialogues(WireCase):
    """Each transcript is held whole, byte by byte, and in one piece."""

    def test_the_first_example_of_the_rfc(self):
        mails = self.check_dialogue("""\
            S: 220 localhost ESMTP msmtpd
            C: EHLO bar.com
            S: 250-localhost
            S: 250-PIPELINING
            S: 250-SIZE 67108864
            S: 250-8BITMIME
            S: 250-SMTPUTF8
            S: 250 ENHANCEDSTATUSCODES
            C: MAIL FROM:<Smith@bar.com>
            S: 250 2.1.0 Sender accepted
            C: RCPT TO:<Jones@foo.com>
            S: 250 2.1.5 Recipient accepted
            C: RCPT TO:<Green@foo.com>
            S: 250 2.1.5 Recipient accepted
            C: DATA
            S: 354 Send the mail, then a line with only a dot
            C: Blah blah blah...
            C: ...etc. etc. etc.
            C: .
            S: 250 2.0.0 Delivered
            C: QUIT
            S: 221 2.0.0 Goodbye
            """)
        self.assertEqual([vars_of(mail) for mail in mails], [(
            "Smith@bar.com", ["Jones@foo.com", "Green@foo.com"],
            b"Blah blah blah...\n..etc. etc. etc.\n", "bar.com", None, False)])

    def test_verbs_in_any_case_and_with_idle_arguments(self):
        self.check_dialogue(dialogue("""
            helo -> 250 localhost
            NoOp whatever you say -> 250 2.0.0
            NOOP a\\xe2\\x80\\x8cb -> 250 2.0.0
            vrfy <root> -> 252 2.0.0
            help me -> 214 2.0.0
            EXPN list -> 502 5.5.1
            quit it -> 221 2.0.0
            """))

    def test_order(self):
        mails = self.check_dialogue(dialogue("""
            MAIL FROM:<a@b> -> 503 5.5.1
            HELO x -> 250
            RCPT TO:<c@d> -> 503 5.5.1
            DATA -> 503 5.5.1
            MAIL FROM:<a@b> -> 250
            MAIL FROM:<a@b> -> 503 5.5.1
            DATA -> 503 5.5.1
            RCPT TO:<c@d> -> 250
            RSET -> 250
            MAIL FROM:<a@b> -> 250
            HELO again -> 250
            MAIL FROM:<a@b> -> 250
            RCPT TO:<c@d> -> 250
            RSET foo -> 501 5.5.4
            DATA now -> 501 5.5.4
            DATA -> 354
            . -> 250 2.0.0
            DATA -> 503 5.5.1
            QUIT -> 221 2.0.0 Goodbye
            """))
        self.assertEqual([mail.helo for mail in mails], ["again"])

    def test_syntax(self):
        self.limit(MAX_ERRORS=1000)
        pairs = []
        for begin, lines in (
                ("500 5.5.1", ["", " \t", "FROB", "MAILFROM:<a@b>", b"ma\xc4\xb1l FROM:<a@b>",
                               b"r\xc5\xbfet", "Content-Type: text/plain"]),
                ("501 5.5.2", ["MAIL", "MAIL FROM", "MAIL <a@b>", "MAIL FROM <a@b>",
                               "MAIL TO:<a@b>", "MAIL FROM :<a@b>"]),
                ("500 5.5.2", ["NO\0OP", "NOOP \x1b[2J", "NOOP \x7f", "MAIL FROM:<a\x7f@b>",
                               'MAIL FROM:<"\\\x7f"@b>', "NOOP a\rQUIT", "\rNOOP",
                               b"NOOP \xff", b"MAIL FROM:<\xfc@b> SMTPUTF8", "EHLO a\1b",
                               b"M\xc4IL FROM:<a@b>"]),
                ("501 5.5", ["VRFY", "VRFY \t"]),
                ("502 5.5.1", ["STARTTLS", "AUTH PLAIN"])):
            pairs += [(line, begin) for line in lines]
        with Client(self.serve()) as client:
            client.open()
            self.check(client, *pairs)
            for pair in pairs:
                self.check(client, pair)
            self.check(client, ("MAIL FROM:<a@b>", "250"), ("RCPT FROM:<a@b>", "501 5.5.2"),
                       ("RCPT TO:<>", "501 5.1.3"), ("RCPT TO:<c@d>", "250"), ("DATA", "354"),
                       (".", "250"))

    def test_blanks_tabs_and_crs_around_words(self):
        mails = self.check_dialogue(dialogue("""
            HELO\\tx -> 250 localhost
            \\tNOOP\\t -> 250 2.0.0
            NOOP\\xc2\\xa0x -> 500 5.5.1
            \\x20\\thelp\\r -> 214 2.0.0
            MAIL FROM:<a@b.example>\\t -> 250
            RSET\\t\\r -> 250
            MAIL FROM:\\t<a@b.example>\\tSIZE=3 \\t BODY=8BITMIME \\r -> 250
            \\tRCPT\\tTO: \\t<c@d.example> \\tNOTIFY=NEVER\\t\\r\\r -> 250
            DATA\\t\\r -> 354
            . -> 250
            EHLO \\ty \\r\\r -> 250-localhost|250-|250-|250-|250-|250 ENHANCEDSTATUSCODES
            quit\\t\\r -> 221
            """))
        self.assertEqual([vars_of(mail) for mail in mails],
                         [("a@b.example", ["c@d.example"], b"", "x", None, False)])
        self.assertEqual((mails[0].mail_options, mails[0].rcpt_options),
                         (["SIZE=3", "BODY=8BITMIME"], ["NOTIFY=NEVER"]))

    def test_smtputf8(self):
        self.check_dialogue(dialogue("""
            HELO x -> 250
            MAIL FROM:<\\xc3\\xbc@b> -> 553 5.6.7
            MAIL FROM:<a@b> -> 250
            RCPT TO:<\\xc3\\xbc@d> -> 553 5.6.7
            RSET -> 250
            MAIL FROM:<\\xc3\\xbc@b> SMTPUTF8 -> 250
            RCPT TO:<\\xc3\\xbc@d> -> 250
            QUIT -> 221 2.0.0 Goodbye
            """))

    def test_ten_errors_end_the_session(self):
        for line, begin in (("FROB", "500 5.5.1"), ("MAIL", "501 5.5.2"), ("RSET x", "501 5.5.4"),
                            ("VRFY", "501 5.5"), ("MAIL FROM:<a@b> SIZE=x", "501 5.5.4"),
                            (b"NOOP \xff", "500 5.5.2"), ("x" * 3000, "500 5.5.2")):
            with self.subTest(line[:20]), Client(self.serve()) as client:
                client.open()
                self.check(client, *[(line, begin), ("DATA", "503"), ("NOOP", "250")] * 9,
                           (line, "421 4.7.0"))
                self.assertEqual(client.rest(), "")

    def test_what_is_no_error_of_its_own(self):
        with Client(self.serve(max_size=1000)) as client:
            client.open()
            self.check(client, *[("RCPT TO:<c@d>", "503 5.5.1"), ("DATA", "503 5.5.1"),
                                 ("MAIL FROM:<-a@b>", "501 5.1.7"), ("MAIL FROM:<a@b", "501 5.1.7"),
                                 ("MAIL FROM:<\u00fc@b>", "553 5.6.7"),
                                 ("MAIL FROM:<a@b> SIZE=1001", "552 5.3.4")] * 10,
                       ("MAIL FROM:<a@b>", "250"), *[
                           ("MAIL FROM:<a@b>", "503 5.5.1"), ("RCPT TO:<-c@d>", "501 5.1.3"),
                           ("RCPT TO:<>", "501 5.1.3"), ("DATA", "503 5.5.1")] * 10,
                       ("QUIT", "221"))

    def test_a_pipelined_mail_behind_a_refused_one_goes_through(self):
        mails = self.check_dialogue(dialogue("""
            HELO x -> 250
            MAIL FROM:<a@b.example> SIZE=99999999999 -> 552 5.3.4""" + 12 * """
            RCPT TO:<c@d.example> -> 503 5.5.1""" + """
            DATA -> 503 5.5.1
            RSET -> 250
            MAIL FROM:<good@b.example> -> 250
            RCPT TO:<c@d.example> -> 250
            DATA -> 354
            x\\r\\n. -> 250 2.0.0
            QUIT -> 221 2.0.0 Goodbye
            """))
        self.assertEqual([mail.sender for mail in mails], ["good@b.example"])

    def test_long_lines(self):
        self.check_dialogue(dialogue("""
            NOOP %s -> 250
            NOOP x%s -> 500 5.5.2
            %s -> 500 5.5.2
            QUIT -> 221
            """ % ("x" * 2041, "x" * 2041, "x" * 2047)))
        with Client(self.serve()) as client:
            client.open()
            self.check(client, ("x" * 65534, "500 5.5.2"), ("NOOP", "250"))

    def test_a_line_without_an_end(self):
        for data in b"x" * 65537, b"x" * 65536 + b"\n", b"NOOP\r\n" + b"x" * 70000:
            with self.subTest(data[:6]), Client(self.serve()) as client:
                client.open()
                client.send(data)
                self.assertEqual(re.findall(r"^\S+ \S+", client.rest(), re.M),
                                 ["250 2.0.0"] * data.count(b"NOOP") + ["421 4.5.2"])

    def test_pipelined_replies_come_in_one_packet(self):
        with Packets(self.serve_packets()) as client:
            client.open()
            client.send(b"NOOP\r\n" * 100)
            self.assertEqual(client.socket.recv(10000), b"250 2.0.0 Here\r\n" * 100)

    def test_pipelined_replies_do_not_add_up_what_slow_checks_take(self):
        """The client of a thousand recipients would give up before the reply to the first."""
        def check(address, mail):
            checked.append(address)
            if len(checked) == 3:
                time.sleep(1.5 * msmtpd.GATHERING)
            elif len(checked) == 5:
                self.assertTrue(heard.wait(PATIENCE))
        self.limit(GATHERING=0.02)
        checked, heard = [], threading.Event()
        self.addCleanup(heard.set)
        with Client(self.serve(check=check)) as client:
            client.open()
            client.send("MAIL FROM:<a@b>\r\n" + "RCPT TO:<c@d>\r\n" * 8)
            self.assertEqual([client.reply()[0][:9] for _ in range(3)],
                             ["250 2.1.0", "250 2.1.5", "250 2.1.5"])
            self.assertFalse(heard.is_set())
            heard.set()
            self.assertEqual([client.reply()[0][:9] for _ in range(6)], ["250 2.1.5"] * 6)

    def test_a_farewell_is_heard_by_one_who_talks_on(self):
        """Its output has ended, but it is not closed: that would be a reset."""
        def deliver(mail):
            raise msmtpd.TemporaryFailure("bye", 421)
        mail = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"
        server = self.serve(deliver)
        for said in mail, "FROB\r\n" * 10, "GET /\r\n", mail * 1000:
            with self.subTest(said[:10]), Client(server) as client:
                client.open()
                client.send(said)
                self.assertEqual(client.rest().splitlines()[-1][:4], "421 ")
                for _ in range(3):
                    client.send("x")


class Limits(WireCase):
    """RFC 5321 4.5.3.1, and one's own."""

    def test_are_those_of_the_manual(self):
        try:
            with open(os.path.join(HERE, "msmtpd.1"), encoding="utf-8") as file:
                manual = re.sub(r"\n(\.[A-Z]\w )?", " ", file.read()).replace(",", "")
        except OSError:
            self.skipTest("no msmtpd.1")
        for words, value in (
                ("at most %d recipients", msmtpd.MAX_RECIPIENTS),
                ("of %d KiB together", msmtpd.MAX_RECIPIENT_BYTES / 1024),
                ("default is %dM", msmtpd.MAX_SIZE / 1024 ** 2),
                ("default is %d[.]", msmtpd.MAX_SESSIONS), ("default is %d[.]", msmtpd.TIMEOUT),
                ("default is %d\\b", msmtpd.DELIVERY_TIMEOUT),
                ("for %d seconds is disconnected", msmtpd.FULL_TIMEOUT),
                ("%d bytes per second", msmtpd.MIN_RATE), ("over %d KiB", msmtpd.MAX_MEMORY / 1024),
                ("%d seconds to arrive", msmtpd.GRACE),
                ("there are %d of these", msmtpd.MAX_UNENDED)):
            with self.subTest(words):
                self.assertTrue(re.search(words % value, manual))

    def test_recipients(self):
        self.limit(MAX_RECIPIENTS=3)
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b>", *("RCPT TO:<r%d@d>" % n for n in range(3)))
            self.check(client, ("RCPT TO:<r3@d>", "452 4.5.3"), ("DATA", "354"), (".", "250"))
        self.assertEqual(self.mails[0].recipients, ["r0@d", "r1@d", "r2@d"])

    def test_bytes_of_recipients(self):
        """Each takes nine more than its own, as an argument of a command does."""
        self.limit(MAX_RECIPIENT_BYTES=28)
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b> SMTPUTF8")
            self.check(client, ("RCPT TO:<%s@d>" % (10 * "\u00fc"), "452 4.5.3"),
                       ("RCPT TO:<1234567@d>", "250"), ("RCPT TO:<c@d>", "452"),
                       ("RCPT TO:<c>", "250"), ("RSET", "250"),
                       # What a transaction that was given up took, or left, does not count.
                       *[("MAIL FROM:<a@b>", "250"), ("RCPT TO:<1234567@d>", "250"),
                         ("RSET", "250")] * 2,
                       ("MAIL FROM:<a@b>", "250"), ("RCPT TO:<%s@d>" % ("x" * 18), "452"))

    def test_size(self):
        for received in False, True:
            with Client(self.serve(max_size=1000, received=received)) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                for size, code in ((1000, "250 2.0.0"), (1001, "552 5.3.4"), (300000, "552 5.3.4"),
                                   (1000, "250 2.0.0")):
                    self.assertEqual(client.do("x" * (size - 2) + "\r\n.")[:9], code)
                    client.do("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            self.assertEqual([len(without_trace(mail.data)) for mail in self.mails], [999, 999])

    def test_no_size(self):
        with Client(self.serve(max_size=0)) as client:
            client.reply()
            client.send("EHLO x\r\n")
            self.assertIn("250-SIZE 0", client.reply())
            self.assertEqual(client.do("MAIL FROM:<a@b> SIZE=99999999999")[:3], "250")

    def test_silent_and_slow_clients(self):
        def silent(begin):
            with Client(server) as client:
                client.send(begin)
                return client.rest().splitlines()[-1][:9]

        def slow(pause, *lines):
            """Send a byte at each pause until the server has had enough."""
            end = time.monotonic() + PATIENCE
            with Client(server) as client:
                client.open(*lines)
                with contextlib.suppress(ConnectionError):
                    while not select.select([client.socket], [], [], pause)[0]:
                        client.send("x")
                        self.assertLess(time.monotonic(), end, "the server puts up with it")
                return client.rest()[:9]
        self.limit(TURN=0.03)
        server = self.serve(timeout=0.2)
        head = ["MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"]
        text = "HELO x\r\n" + "\r\n".join(head) + "\r\n"
        cases = [(silent, begin) for begin in (
            "", "HELO x\r\n", "NOO", text, text + "x\r\n",
            text + "x" * 200000)]       # a lot of it earns nobody a longer silence
        cases += [(slow, pause, *lines) for pause in (0.05, 0.01) for lines in ([], head)]
        self.assertEqual(at_once(lambda case: case[0](*case[1:]), cases),
                         ["421 4.4.2"] * len(cases))
        self.assertEqual(self.mails, [])

    def test_clients_that_do_not_read_or_only_late(self):
        def fill(client):
            """Send verbs until no more fit, since the server cannot reply; return their number."""
            client.open()
            client.socket.settimeout(0.1)
            for number in itertools.count(step=100):
                try:
                    client.send(b"HELP\r\n" * 100)
                except OSError:
                    client.socket.settimeout(PATIENCE)
                    return number
        self.limit(TURN=0.05)
        with Packets(self.serve_packets()) as late:
            for _ in range(fill(late)):
                self.assertEqual(late.reply()[0][:4], "214 ")
        with self.assertLogs("msmtpd") as logs, \
                Packets(self.serve_packets(timeout=0.12)) as client:
            fill(client)
            self.wait_for_log(logs, "was silent")


# Mail data

SECOND = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nsmuggled\r\n"
SECOND_TEXT = SECOND.replace(b"\r\n", b"\n")


class MailData(WireCase):
    """RFC 5321 4.5.2 and 4.1.1.4."""

    TABLE = (       # as sent, without the end of the data; as handed over
        (b"", b""), (b"\r\n", b"\n"), (b"x\r\n", b"x\n"), (b"\0\xff\r\n", b"\0\xff\n"),
        (b"..\r\n", b".\n"), (b".x\r\n", b"x\n"), (b"x.\r\n..y\r\n", b"x.\n.y\n"),
        (b"a\nb\r\n", b"a\nb\n"), (b"a\n..b\r\n", b"a\n.b\n"), (b"a\n\r\n", b"a\n\n"),
        (b"a\rb\r\n", b"a b\n"), (b"a\r\n.\rb\r\n", b"a\n b\n"), (b"a\r\n...\r\n", b"a\n..\n"),
        # All CRs before a LF are of the line end, however many; others are blanks.
        (b"a\r\r\n", b"a\n"), (b"\r\r\r\n", b"\n"), (b"a\r\r\r\n\r\r\r\nb\r\n", b"a\n\nb\n"),
        (b"\n\r\r\n", b"\n\n"), (b".\r\r\n", b"\n"), (b"..\r\r\n", b".\n"),
        (b"a\r\rb\r\n", b"a  b\n"), (b"\r\r.\r\r\n", b"  .\n"), (b"a\r \r\r\n", b"a  \n"),
        (b"\r\0\r\n", b" \0\n"), (b"a\r\r\n.\r.\r\n", b"a\n .\n"),
        (b"Subject: x\r\r\n\r\r\nHi\r\r\n..y\r\r\n", b"Subject: x\n\nHi\n.y\n"),
    )

    def test_table_in_any_pieces(self):
        with Packets(self.serve_packets()) as client:
            client.open()
            for sent, expected in self.TABLE:
                inside = range(1, len(sent) + 3)
                for cuts in ((), inside, *itertools.combinations(inside, 2)):
                    mail = self.mail(client, sent + b".\r\n", cuts)
                    self.assertEqual((mail.data, mail.size), (expected, len(expected)), cuts)

    def test_crs_without_end(self):
        """What is held back of them is a number: as bytes, these would take a minute."""
        started = time.process_time()
        with Packets(self.serve_packets()) as client:
            client.open()
            for size, step in (65536, 4096), (4 << 20, 1024):
                for rest, expected in (
                        (b".\r\n" + SECOND, b"a%s.\n%s" % (b" " * size, SECOND_TEXT)),
                        (b"\nb\r\n", b"a\nb\n"), (b"b\r\n", b"a%sb\n" % (b" " * size))):
                    mail = self.mail(client, b"a" + b"\r" * size + rest + b".\r\n",
                                     range(step, size, step))
                    self.assertTrue(mail.data == expected, (size, rest))
                    if size > 65536:
                        break
        self.assertLess(time.process_time() - started, 5)

    def test_bare_lf_ends_the_data_only_where_every_line_ended_so(self):
        lines = ["HELO x", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"]
        server = self.serve()
        for number, end in itertools.product(range(-2, len(lines)), ("\r\n", "\r\r\n")):
            with self.subTest(number, end=end), Client(server) as client:
                if number == -2:        # a line that is too long is one of them
                    client.send("x" * 20000 + end)
                client.send("".join(line + (end if n == number else "\n")
                                    for n, line in enumerate(lines)))
                client.send("one\n.\nNOOP\ntwo\r\n.\r\nQUIT\n")
                client.rest()
                self.assertEqual([mail.data for mail in self.mails],
                                 [b"one\n" if number == -1 else b"one\n\nNOOP\ntwo\n"])
                self.mails.clear()

    def test_the_line_of_data_is_no_end_but_by_its_own(self):
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>")
            client.send("DATA\n.\r\nNOOP\r\n.\r\n")
            self.assertEqual(client.line()[:3], "354")
            self.assertEqual(client.line(), "250 2.0.0 Delivered")
            self.assertEqual([mail.data for mail in self.mails], [b"\nNOOP\n"])

    def test_received_line_stands_first(self):
        with Client(self.serve(received=True)) as client:
            client.open()
            for sent, expected in ((b"Subject: x\r\n", b"Subject: x\n"), (b" x\r\n", b"\n x\n"),
                                   (b"\tx\r\n", b"\n\tx\n"), (b". x\r\n", b"\n x\n"),
                                   (b"\rx\r\n", b"\n x\n"), (b"", b""), (b"\r\n", b"\n"),
                                   (b"\r\r\n x\r\n", b"\n x\n"), (b"\r\r x\r\n", b"\n   x\n")):
                with self.subTest(sent):
                    data = self.mail(client, sent + b".\r\n").data
                    self.assertRegex(data, rb"\AReceived: from client.example \(\[127.0.0.1\]\)\n"
                                           rb"\tby localhost \(msmtpd\) with ESMTP;\n\t.*\n")
                    self.assertEqual(data.split(b"\n", 3)[3], expected)

    def test_one_that_comes_back_again_and_again_is_refused(self):
        """RFC 5321 6.3. All sessions would be taken until the first command's time is over."""
        def send_back(mail):
            came.append(mail.data.count(b"Received: "))
            try:
                self.send_one(server, mail.data)
            except smtplib.SMTPDataError as error:
                raise msmtpd.PermanentFailure(error.smtp_error[6:].decode(), error.smtp_code,
                                              error.smtp_error[:5].decode()) from None
        came = []
        server = self.serve(send_back, received=True)
        in_body = "Received: by localhost (msmtpd) with ESMTP;\r\n" * 20
        with Client(server) as client:
            client.data()
            self.assertRegex(client.do("Subject: x\r\n\r\n%s." % in_body), "554 5.4.6 ")
        self.assertEqual([n - 20 for n in came], [1, 2, 3, 4, 5])

    def test_no_other_mail_is_taken_for_one_that_comes_back(self):
        others, ours = ("Received: by %s with ESMTP;\r\n\tsome day\r\n" % name * 30
                        for name in ("b.example", "localhost (msmtpd)"))
        for header, received in ((others, True), (ours, False)):
            with self.subTest(received=received), \
                    Client(self.serve(received=received)) as client:
                client.data()
                self.assertEqual(client.do(header + "\r\nx\r\n.")[:3], "250")

    def send_large(self, deliver=None):
        """Send a large mail and a small one; both have to arrive whole."""
        body = b"".join(b"%d %s\r\n" % (n, b"." * (n % 97)) for n in range(50000))
        with Client(self.serve(deliver)) as client:
            client.open()
            self.assertTrue(self.mail(client, body + b".\r\n").data == body.replace(b"\r", b""))
            self.assertEqual(self.mail(client, b"x\r\n.\r\n").data, b"x\n")

    def test_large_mail_goes_through_a_file_of_ones_own(self):
        def deliver(mail):
            self.mails.append(mail)
            if mail.size > msmtpd.MAX_MEMORY:
                state = os.fstat(mail.file.fileno())
                states.append((stat.S_IMODE(state.st_mode), state.st_nlink, state.st_dev,
                               os.listdir(folder)))
        folder, states = self.new_folder(), []
        with mock.patch.object(tempfile, "tempdir", folder):
            self.send_large(deliver)
        self.assertEqual(states, [(0o600, 0, os.stat(folder).st_dev, [])])

    @unittest.skipUnless(hasattr(os, "memfd_create"), "no memfd")
    def test_large_mail_where_no_folder_can_be_written(self):
        with mock.patch.object(tempfile, "tempdir", "/nonexistent"):
            self.send_large()


@unittest.skipUnless(hasattr(resource, "prlimit") and os.path.exists("/proc/self/fd"), "no prlimit")
class MailsThatFindNoRoom(ProgramCase):
    def test_are_refused_and_give_their_room_back_at_once(self):
        def spools():
            """The files without a name that the server has open; None if that changes."""
            folder = "/proc/%d/fd/" % daemon.pid
            with contextlib.suppress(FileNotFoundError):
                return [name for name in os.listdir(folder)
                        if os.readlink(folder + name).endswith(" (deleted)")]
        daemon = self.start("--max-size=300K", restore_signals=False)     # ignore SIGXFSZ
        for limit, more, reply in (None, 80000, "552 5.3.4"), (250000, 30000, "452 4.3.1"):
            if limit:       # as a disk that is full
                resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (limit, limit))
            with self.subTest(reply), Client(daemon) as client:
                client.data()
                client.send("x" * 240000)
                wait_for(spools, "the file")
                client.send("x" * more)
                wait_for(lambda: spools() == [], "its end")
                self.assertEqual(client.do("\r\n.")[:9], reply)
                self.assertEqual(self.send(daemon)[:3], "250")
        self.assertEqual(len(self.delivered()), 2)
        self.assertIn(os.strerror(errno.EFBIG), self.logged())


TRANSACTION = ("EHLO client.example\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\n"
               "DATA\r\nSubject: cut\r\n\r\n..one\r\n.\r\n")
CUT_DATA = b"Subject: cut\n\n.one\n"


class CutAnywhere(WireCase):
    """A client that leaves delivers nothing before the end of data and once after it."""

    def cut(self, leave, reads):
        """Leave after each byte of a transaction; return how many mails there are after each."""
        server, counts = self.serve(), []
        for length in range(len(TRANSACTION) + 1):
            counts.append(len(self.mails))
            client = Client(server)
            client.send(TRANSACTION[:length])
            if reads:       # the greeting, and replies as far as to DATA
                for _ in range(1 + min(TRANSACTION.count("\n", 0, length), 4)):
                    client.reply()
            leave(client)
        wait_for(lambda: self.mails, "the mail")
        server.stop()           # waits for every session
        return [*counts, len(self.mails)]

    def test_leaving_after_each_byte(self):
        for leave, reads in itertools.product((Client.close, Client.reset), (True, False)):
            with self.subTest(leave=leave.__name__, reads=reads):
                self.assertEqual(self.cut(leave, reads), [0] * (len(TRANSACTION) + 1) + [1])
                self.assertEqual([mail.data for mail in self.mails], [CUT_DATA])

    def test_pieces_do_not_change_the_outcome(self):
        whole = TRANSACTION.encode() * 2 + b"QUIT\r\n"
        rng = random.Random(5321)
        cuts = [[], range(1, len(whole)), [m.end() for m in re.finditer(rb"\n", whole)][:-1]]
        cuts += [sorted(rng.sample(range(1, len(whole)), 20)) for _ in range(30)]
        outcomes = set()
        path = self.serve_packets()
        for cut in cuts:
            with Packets(path) as client:
                send_pieces(client, whole, cut)
                outcomes.add((client.rest(), repr([vars_of(mail) for mail in self.mails])))
            self.assertEqual([mail.data for mail in self.mails], [CUT_DATA] * 2)
            self.mails.clear()
        self.assertEqual(len(outcomes), 1)


# What other servers have taken for the end of data, and what it is: lines of the mail.
NO_ENDS = [
    (b"\n.\n", b"\n\n"), (b"\r\n.\n", b"\n\n"), (b"\n.\r\n", b"\n\n"),
    (b"\r.\r", b" . "), (b"\r\n.\r", b"\n "), (b"\r.\r\n", b" .\n"), (b"\r.\n", b" .\n"),
    (b"\n.\r", b"\n "), (b"\r\n\0.\r\n", b"\n\0.\n"), (b"\r\n.\0\r\n", b"\n\0\n"),
    (b"\r\n.\r\0\n", b"\n \0\n"), (b"\r\0\n.\r\n", b" \0\n\n"), (b"\r\n. \r\n", b"\n \n"),
    (b"\r\n .\r\n", b"\n .\n"), (b"\r\n..\r\n", b"\n.\n"), (b"\r\n.\t\r\n", b"\n\t\n"),
    (b"\r\n.\r\r\n", b"\n\n"), (b"\r\r\n.\n", b"\n\n"), (b"\r\r\n.\r\r\n", b"\n\n"),
    (b"\n.\r\r\n", b"\n\n"), (b"\r\r.\r\r\n", b"  .\n"), (b"\r\r\n.\r", b"\n "),
    (b"\r\n\r.\r\n", b"\n .\n"), (b"\r\n.\r\r\r\n", b"\n\n"), (b"\r\r\n.\r\0\r\n", b"\n \0\n"),
]


class Smuggling(WireCase):
    """A line that only looks like the end of data is text, and so is the mail behind it."""

    def test_only_one_end_of_data(self):
        with Packets(self.serve_packets()) as client:
            client.open()
            for variant, text in NO_ENDS:
                for cut in range(len(variant) + 1):
                    mail = self.mail(client, b"one" + variant + SECOND + b".\r\n", [3 + cut])
                    self.assertEqual(mail.data, b"one" + text + SECOND_TEXT, (variant, cut))

    def test_borders_of_reads(self):
        with Client(self.serve()) as client:
            client.open()
            for size, shift in itertools.product((4096, 65536), range(-5, 3)):
                sent = expected = b"x" * (size + shift)
                for variant, text in NO_ENDS:
                    filling = b"x" * (size - len(variant) - len(SECOND))
                    sent += variant + SECOND + filling
                    expected += text + SECOND_TEXT + filling
                mail = self.mail(client, sent + b"\r\n.\r\n")
                self.assertTrue(mail.data == expected + b"\n", (size, shift))

    def test_end_of_data_in_any_pieces(self):
        self.limit(MAX_ERRORS=10000)
        path = self.serve_packets()
        for line_end, cases in (
                (b"\r\n", ((b"a.\n.\r\n..\r\n.\r\n", b"a.\n\n.\n"), (b".\r\n", b""),
                           (b"\r\n.\r\n", b"\n"), (b"a\r\r\n.\r\n", b"a\n"))),
                (b"\n", ((b"..\n.\n", b".\n"), (b".\n", b""), (b"x\r\n.\r\n", b"x\n"),
                         (b"x\r\n.\n", b"x\n"), (b"x\r\r\n.\n", b"x\n"), (b"\n.\n", b"\n"),
                         (b"x\n.y\n.\n", b"x\ny\n"), (b"\n.\r\n.\n", b"\n\n"),
                         (b"\r.\n.\n", b" .\n")))):
            head, tail = HEAD.replace(b"\r\n", line_end), b"NOOP\n.\n".replace(b"\n", line_end)
            with Packets(path) as client:
                client.send(b"HELO x" + line_end)
                client.reply(), client.reply()
                for sent, expected in cases:
                    inside = range(1, len(sent) + 3)
                    for cuts in (inside, *itertools.combinations(inside, 2)):
                        # There is another end behind it, but it is not the first.
                        mail = self.mail(client, sent + tail, cuts, head)
                        self.assertEqual(mail.data, expected, (sent, cuts))
                        self.assertEqual([client.line()[:3], client.line()[:3]], ["250", "500"])


MAIL_IN_HTTP = ("EHLO a\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
                "from a web page\r\n.\r\nQUIT\r\n")
REQUEST = "%s / HTTP/1.1\r\nHost: localhost:25\r\nContent-Type: text/plain\r\n\r\n" + MAIL_IN_HTTP
HTTP = [REQUEST % name for name in (
    "POST", "post", "X-NEW", "NOOP\r\nPUT", "EHLO x\r\nX-NEW", "X-NEW\t", "\tX-NEW")] + [
    begin + "\r\n" + MAIL_IN_HTTP for begin in (
        "put /x", "Host: x", "Content-Type: a/b", "FROBNICATE / HTTP/2", "CONNECT a:1 HTTP/1.1",
        "OPTIONS * HTTP/1.0", "FROBNICATE / HTTP/1.1\r", "FROBNICATE / HTTP/1.1 \t\r",
        "NOOP\r\nAUTH /\xe9 HTTP/1.1", "NOOP\r\nGET /" + "x" * 3000 + " HTTP/1.1",
        "GET /" + "x" * 20000, "POST /" + "x" * 70000 + " HTTP/1.1",
        *(name + " /" for name in "CONNECT DELETE GET HEAD OPTIONS PATCH POST PRI PROPFIND PUT "
          "TRACE".split()))]
FOREIGN = [     # what comes, what is answered last, what the log says
    *((text.encode(), "421 4.7.0 ", "spoke HTTP") for text in HTTP),
    (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n" + MAIL_IN_HTTP.encode(), "220 localho", "TLS"),
    (bytes(range(128, 256)) * 600, "421 4.5.2 ", "endless line"),
    (b"\0" * 66000, "421 4.5.2 ", "endless line"),
    (b"\x80\r\n\xff\n" * 6 + MAIL_IN_HTTP.encode(), "421 4.7.0 ", "closed: "),
    (b"HELO x\r\n" + HEAD[:-6] + b"BDAT 9 LAST\r\n" + MAIL_IN_HTTP.encode(), "503 5.5.1 ", "BDAT"),
]


class CrossProtocol(WireCase, ProgramCase):
    """Who speaks something else delivers nothing, and can read why."""

    def test_foreign_protocols(self):
        server = self.serve()
        for (data, answer, words), pieces in itertools.product(FOREIGN, (1, 7, 50)):
            with self.subTest(data=data[:40], pieces=pieces), \
                    self.assertLogs("msmtpd") as logs, Client(server) as client:
                said = client.line() + "\n"
                with contextlib.suppress(ConnectionError):      # it closes while more comes
                    send_pieces(client, data, [len(data) * n // pieces for n in range(1, pieces)])
                # Nothing may be said to who speaks TLS, so that one may see a reset.
                said += client.rest() or ""
                self.assertEqual(said.splitlines()[-1][:len(answer)], answer)
                self.assertNotIn("\n354", said)
                self.wait_for_log(logs, words)
        self.assertEqual(self.mails, [])

    def test_a_delivered_mail_makes_up_for_errors(self):
        """Some clients send an empty line, or a verb that is unknown here, with each mail."""
        with Client(self.serve()) as client:
            client.open()
            for _ in range(12):
                self.check(client, ("XFROB", "500"), ("STARTTLS", "502"),
                           ("MAIL FROM:<a@b>", "250"), ("RCPT TO:<c@d>", "250"),
                           ("DATA", "354"), (".", "250"), ("", "500"))
            self.check(client, *[("", "500")] * 8, ("", "421"))

    def test_replies_are_sent_once(self):
        """Ten errors in one piece: ten replies, on descriptors as on a socket."""
        done = self.run_program("--inetd", "--command=true", input=b"nonsense\r\n" * 12)
        self.assertEqual([line[:3] for line in done.stdout.decode().splitlines()],
                         ["220"] + ["500"] * 9 + ["421"])


# The command

def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        with open("/proc/%d/stat" % pid, encoding="latin-1") as file:
            return ") Z " not in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_descriptors():
    """How many descriptors this process has open, without those of what nobody holds any more."""
    gc.collect()
    return len(os.listdir("/dev/fd"))


@contextlib.contextmanager
def soft_limit(what, value):
    """Lower a resource limit of this process, and of what it starts, for a while."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def in_fork(function):
    """Call `function` in a fork of this process; return its exit status, 1 if it raised."""
    with warnings.catch_warnings():     # of threads, none of which holds a lock here
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        status = 1
        try:
            status = function() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1])


# Local parts that mean something to a shell. Some are addresses only between quotes.
HOSTILE = ["o'brien", "r&d", "`touch${IFS}HIT`", "a|touch${IFS}HIT", "a&touch${IFS}HIT&", "a*",
           "~root", "{touch}", "#a", "!a", "$HOME", "a&&b", "a^b", "?",
           '"$(touch HIT)"', '"$(touch${IFS}HIT)"',
           '"`touch HIT`"', '";touch HIT;"', '"|touch HIT"', '">HIT"', '"<HIT"',
           '"\\"; touch HIT; \\""', '"a\' ; touch HIT; \'b"', '"-f"', '"a b"', '"%F"']


class AddressRule(Case):
    """What is valid but not inert is accepted only where nothing can parse it again."""

    SAFE = ("cat -f %F --", "cat --", "cat --from=%F --", "cat -f%F", "/bin/cat %F", "cat '%F' --",
            'cat "%F" --', "cat -x '' \"a b\" %F", "cat 'a;b' %F", r"cat a\;b %F", "cat a=b %F",
            "/usr/bin/env cat %F")
    UNSAFE = (
        "cat a%F", "cat 'x %F'", "cat from=%F", "sh -c 'cat' %F", "sh -c 'cat -f %F'",
        "bash -c 'cat \"$@\"' x", "cat %F; cat", "cat $HOME %F", "cat `true` %F", "cat %F | cat",
        "cat <x %F", "cat *", "cat ~ %F", "A=b cat %F", "cat # %F", "/usr/bin/ssh host cat %F",
        "nice ssh host", "cat --rsh=ssh %F", "cat -e 'nice ssh' %F", "xargs cat", "busybox sh",
        "su -c cat", "sudo cat %F", "cat \"$HOME\" %F", "nosuchprogram %F", "cat -f %F%F",
        "exec cat %F", "/bin/bash5.2 %F", "env systemd-run1 cat", "env zsh5-static",
        "env sudo.ws cat", "env su-exec cat", "cat {a,b} %F", "cat && cat", "! cat", "cat -f%Fx")

    def test_commands_that_take_every_address_and_those_that_take_inert_ones_only(self):
        for text in self.SAFE + self.UNSAFE:
            command = msmtpd.Command(text)
            with self.subTest(text):
                command.check("a.b+c=d@c.example")
                for local in HOSTILE:
                    check = functools.partial(command.check, local + "@c.example")
                    if text in self.SAFE:
                        check()
                    else:
                        self.assertRaises(msmtpd.PermanentFailure, check)

    def test_what_is_inert(self):
        command = msmtpd.Command("cat %F; :")
        characters = {chr(number): chr(number).isalnum() or chr(number) in "@._+/=:%,-"
                      for number in range(0x21, 0x7f)}
        characters.update(dict.fromkeys("\u00e9\u56db\u00df\u03a9", True))
        characters.update(dict.fromkeys("\u00a0\u00d7\u2028\u3000\uff5c\U0001f600", False))
        for character, is_inert in characters.items():
            with self.subTest(character):
                check = functools.partial(command.check, "x%sx@c.example" % character)
                if is_inert:
                    check()
                else:
                    self.assertRaises(msmtpd.PermanentFailure, check)

    def test_no_command_takes_what_it_may_read_as_an_option_a_program_or_a_file(self):
        command = msmtpd.Command("cat --")
        for address in ("-oQ/tmp@c.example", "-x", "|x@b", "|x", "x|", '"a b"|', "+x", "/tmp/x",
                        "a/b", '+x@y/"z"'):
            with self.subTest(address), self.assertRaises(msmtpd.PermanentFailure):
                command.check(address)
        for address in ("+x@b", "a/b@c", "a|b@c", "/x@b", "root", ""):
            with self.subTest(address):
                command.check(address)

    def test_a_mail_made_by_hand_is_checked_too(self):
        for sender, recipient in ("a@b", "$(touch x)@b"), ("$(touch x)@b", "c@d"):
            with self.assertRaises(msmtpd.PermanentFailure):
                msmtpd.Command("cat %F; true")(msmtpd.Mail(sender, [recipient], b"x\n"))

    def test_commands_that_cannot_work(self):
        for text in ("", "  ", "cat\ncat", "cat\0", "cat;", "cat &", "cat | ", "cat >", "cat <",
                     "cat &&", "if", "cat | { ", "while", "cat 'x", 'cat "x', "cat )"):
            with self.subTest(text), self.assertRaises(ValueError):
                msmtpd.Command(text)
        for text in "cat %F\r", "cat -f\r%F --", "cat %F\r; cat":
            with self.subTest(text), self.assertRaisesRegex(ValueError, "CR|carriage return"):
                msmtpd.Command(text)
        for seconds in (0, -1, float("nan")):
            with self.subTest(seconds), self.assertRaises(ValueError):
                msmtpd.Command("cat", timeout=seconds)

    def test_commands_that_may_not_work(self):
        for text, count in (("cat # %F", 1), ("cat %F #", 1), ("true;#x %F", 1),
                            ("./nosuchprogram %F", 1), ("/dev/null %F", 1), ("/ %F", 1),
                            ("'/no/such' %F", 1), ('A=1 B=2 "nosuchprogram" %F', 1),
                            ("A=1 exec cat %F", 0), ("'cat' %F", 0),
                            ("cat 'a # b'", 0), ("cat a#b", 0), ("exec cat", 0),
                            ("cat $(true)", 0), ("f() { cat; }; f", 0)):
            with self.subTest(text):
                self.assertEqual(len(msmtpd.Command(text).warnings), count)
        for name in "nosuchprogram", "execnosuch", "exec.nosuch":
            for text in name + " %F", "exec %s %%F" % name:
                with self.subTest(text):
                    self.assertRegex(" ".join(msmtpd.Command(text).warnings),
                                     r"program %s;" % re.escape(name))


class CommandCase(ProgramCase):
    """Tests of a Command by itself."""

    def run_command(self, command, mail=None, **options):
        """Run a command, or the text of one; return the failure, or None, and the outcome."""
        mail = mail or msmtpd.Mail("a@b", ["c@d"], b"x\n")
        try:
            if isinstance(command, str):
                command = msmtpd.Command(command, **options)
            command(mail)
        except (msmtpd.TemporaryFailure, msmtpd.PermanentFailure) as error:
            return error, mail.outcome
        return None, mail.outcome

    def assert_fails(self, command, code, enhanced, mail=None):
        """Run a command that fails with these codes, and return the failure."""
        failure, _ = self.run_command(command, mail)
        self.assertEqual((failure.code, failure.enhanced), (code, enhanced))
        return failure

    def wait_for_pid(self, name="pid"):
        """The process id that a script has written to a file."""
        path = self.path(name)
        wait_for(lambda: os.path.exists(path) and os.path.getsize(path), "a process id")
        with open(path, encoding="ascii") as file:
            return int(file.read())

    def wait_for_end(self, pid):
        wait_for(lambda: not is_running(pid), "a process to end")


GLIBC = re.match(r"(\d+)\.(\d+)", dict([platform.libc_ver()]).get("glibc", ""))
HAS_POSIX_SPAWN = bool(ctypes and GLIBC) and tuple(map(int, GLIBC.groups())) >= (2, 34)

REPLIES = {     # to the exit statuses of sysexits.h, timeout(1), shells and ssh; others: 554 5.3.0
    0: None, 65: (554, "5.6.0"), 67: (554, "5.1.1"), 68: (451, "4.3.0"), 69: (451, "4.3.0"),
    71: (451, "4.3.0"), 75: (451, "4.3.0"), 77: (554, "5.7.0"), 78: (554, "5.3.5"),
    124: (451, "4.3.0"), 126: (451, "4.3.5"), 127: (451, "4.3.5"),
    **dict.fromkeys((129, 130, 137, 143, 200, 254, 255), (451, "4.3.0"))}


class Delivery(CommandCase):
    """The command: RFC 5321 says when to accept, sysexits.h how it tells."""

    def test_arguments_and_input(self):
        body = b"x\0\xff\n" * 10
        for text, sender, recipients, arguments in (
                (" -f %F --", "a@b", ["c@d", "e@f"], ["-f", "a@b", "--", "c@d", "e@f"]),
                (" --from=%F %F", "", ["c"], ["--from=MAILER-DAEMON", "%F", "c"]),
                (" 'a b' \"c\" \\$", "a@b", ["o'brien@d"], ["a b", "c", "$", "o'brien@d"]),
                (" -f %F; true", "a@b", ["c@d"], ["-f", "a@b"]),
                (" -f %F %F; true", "a@b", ["c@d"], ["-f", "a@b", "%F"]),
                (" \"$HOME\" -f '%F' -- ", "", ["c", "d"],
                 [os.environ.get("HOME", ""), "-f", "MAILER-DAEMON", "--", "c", "d"])):
            with self.subTest(text):
                mail = msmtpd.Mail(sender, recipients, body)
                self.assertEqual(self.run_command(self.capture + text, mail), (None, "exit=0"))
                self.assertEqual(self.delivered()[-1], (arguments, body))

    def test_exit_statuses(self):
        script = self.script("exit", "#!/bin/sh\nexit $1\n")
        cases = [(text, status) for status in (1, *range(64, 79), 123, 128, *REPLIES)
                 for text in ("%s %d", "%s %d || exit $?")]
        results = at_once(lambda case: self.run_command(case[0] % (script, case[1])), cases)
        for (text, status), (failure, outcome) in zip(cases, results):
            with self.subTest(text, status=status):
                self.assertEqual(failure and (failure.code, failure.enhanced),
                                 REPLIES.get(status, (554, "5.3.0")))
                self.assertEqual(outcome, "exit=%d" % status)

    def test_signals(self):
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
            script = self.script("die", "#!/bin/sh\nulimit -c 0; kill -%d $$\n" % number)
            failure, outcome = self.run_command(script)
            self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
            self.assertEqual(outcome, "exit=signal %d" % number)

    def test_what_cannot_be_started(self):
        plain = self.path("plain")
        for change in (lambda: os.chmod(plain, 0o644), lambda: os.remove(plain),
                       lambda: (os.remove(plain), os.mkdir(plain))):
            command = msmtpd.Command(self.script("plain", "#!/bin/sh\n"))
            change()
            self.assert_fails(command, 451, "4.3.5")
        self.assert_fails("nosuchprogram", 451, "4.3.5")
        self.assert_fails("true", 451, "4.3.0", msmtpd.Mail("a@b", ["c\0d@e"], b"x\n"))

    def test_an_interpreter_that_is_missing_is_named(self):
        """Or else the system says 'No such file' of a file that exists."""
        for line, name in (("#!/bin/sh\r\n", r"/bin/sh.*(\\r|CR|carriage return)"),
                           ("#! /no/such/interpreter -x\n", "/no/such/interpreter")):
            with self.subTest(line):
                command = msmtpd.Command(self.script("script", line + "cat >/dev/null\r\n"))
                self.assertRegex(" ".join(command.warnings), name)
                self.assertRegex(str(self.assert_fails(command, 451, "4.3.5")), name)

    def test_a_script_without_an_interpreter_line_is_the_shells(self):
        script = self.script("bare", "cat > %s/out; exit 75\n" % self.folder)
        self.assertEqual(self.run_command(script)[1], "exit=75")

    def test_only_the_status_decides(self):
        for size in 900000, 3000000:
            mail = msmtpd.Mail("a@b", ["c@d"], b"x" * size + b"\n")
            self.assertEqual(self.run_command("true", mail), (None, "exit=0"))
            self.assertEqual(self.run_command("sh -c 'exec <&-; exit 0'", mail)[1], "exit=0")
            self.assertEqual(self.run_command("cat >/dev/null; exit 1; :", mail)[1], "exit=1")

    def test_mails_of_any_size_arrive_whole_and_stay(self):
        def check(size):
            data = os.urandom(size)
            mail = msmtpd.Mail("a@b", ["c@d"], data)
            mail.file.readline()        # who looks at it takes nothing away
            self.assertEqual(self.run_command(self.capture, mail)[1], "exit=0", size)
            self.run_command("head -c 10 >/dev/null; true", mail)
            self.assertTrue((mail.data, mail.file.read(5)) == (data, data[:5]), size)
            return data
        sent = at_once(check, (0, 1, 65535, 65536, 65537, 131072, 131073, 3000000))
        self.assertTrue(sorted(data for _, data in self.delivered()) == sorted(sent))

    def test_its_words_end_the_reply(self):
        script = self.script("moan", "#!/bin/sh\nprintf 'no\\033 way\\n\\nsorry\\n' >&2; exit 1\n")
        failure = self.run_command(script)[0]
        self.assertEqual(list(failure.details), ["no\x1b way", "sorry"])
        self.assertEqual(str(failure), "Command failed (exit 1): no? way; sorry")
        script = self.script(
            "moan", "#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' x >&2; exit 1\n")
        failure = self.run_command(script)[0]
        self.assertEqual(str(failure), "Command failed (exit 1): " + "x" * 300)
        self.assertEqual(sum(map(len, failure.details)), 4096)

    def test_time_limit(self):
        """TERM goes to all that the command started, and KILL to what is left."""
        self.limit(KILL_DELAY=0.2)
        background = "sleep 60 &\necho $! > %s/%s\n"
        loop = "while :; do sleep 0.05; done\n"
        scripts = {
            "plain": background + loop,
            "stubborn": "trap '' TERM\n" + background + loop,
            "zero": "trap 'exit 0' TERM\n" + background + loop,
            "deaf": "(trap '' TERM; exec sleep 60) &\necho $! > %s/%s\nexec sleep 60\n",
            "order": background + "trap 'sleep 0.05; touch %s/done; exit 0' TERM\n" % self.folder
            + loop}
        texts = [self.script(name, "#!/bin/sh\n" + text % (self.folder, name + "-pid"))
                 for name, text in scripts.items()]
        texts[-1] += " && :"        # also where a shell of ours stands before it
        spent = time.process_time()
        results = at_once(lambda text: self.run_command(text, timeout=0.25), texts)
        self.assertLess(time.process_time() - spent, 0.07, "it spins")
        for text, (failure, outcome) in zip(texts, results):
            with self.subTest(text):
                self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
                self.assertEqual(outcome, "exit=timeout")
        for name in scripts:
            self.wait_for_end(self.wait_for_pid(name + "-pid"))
        self.assertTrue(os.path.exists(self.path("done")), "KILL came before its time")

    def delay_start(self, script, seconds):
        """Make the next start of a script take so long, by a lease; return a pipe that tells of it.

        As a program on a network's disk may.
        """
        if not hasattr(fcntl, "F_SETLEASE"):
            self.skipTest("no leases")
        reader, writer = os.pipe()

        def hold():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
            fcntl.fcntl(os.open(script, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)
            os.write(writer, b"leased")
            signal.sigtimedwait({signal.SIGIO}, PATIENCE)       # somebody wants to open it
            os.write(writer, b"opened")
            time.sleep(seconds)
        thread = threading.Thread(target=in_fork, args=(hold,))
        thread.start()
        for cleanup in (thread.join,), (os.close, reader), (os.close, writer):
            self.addCleanup(*cleanup)
        if not select.select([reader], [], [], 1)[0]:
            self.skipTest("no leases in this file system")
        os.read(reader, 6)
        return reader

    def test_time_limit_begins_before_its_start(self):
        script = self.script("late", "#!/bin/sh\nsleep 0.1\ntouch %s/slept\nexec sleep 60\n"
                             % self.folder)
        command = msmtpd.Command(script, timeout=0.15)
        self.delay_start(script, 0.2)
        failure, outcome = self.run_command(command)
        self.assertEqual((failure.code, outcome), (451, "exit=timeout"))
        self.assertFalse(os.path.exists(self.path("slept")), "the limit began at its start only")

    def test_what_ended_well_before_it_was_sent_a_signal_has_delivered(self):
        script = self.script("late", "#!/bin/sh\ncat >/dev/null\ntouch %s/done\n" % self.folder)
        process = self.start("--command=%s --" % script, "--delivery-timeout=0.15")
        pipe = self.delay_start(script, 0.1)
        with Client(process) as client:
            client.data()
            client.send("x\r\n.\r\n")
            os.read(pipe, 6)
            end = time.monotonic() + 0.15           # when its time is over
            process.send_signal(signal.SIGSTOP)     # which takes effect once it has started
            wait_for(lambda: os.path.exists(self.path("done")), "the end of the command")
            time.sleep(max(0, end - time.monotonic()))
            process.send_signal(signal.SIGCONT)
            self.assertEqual(client.reply()[0][:9], "250 2.0.0")

    def test_no_error_of_waiting_makes_a_failure(self):
        """Here of pidfd_open, which gets no descriptor, and of poll, which may watch none."""
        script = self.script("late", "#!/bin/sh\nsleep 0.05\nexit 0\n")
        command = msmtpd.Command(script)
        at_once(int, "1")       # the first thread to end loads a library, in Python 3.8
        pipe = self.delay_start(script, 0.05)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.run_command, command)
            os.read(pipe, 6)
            with soft_limit(resource.RLIMIT_NOFILE, 0):
                self.assertEqual(running.result(), (None, "exit=0"))

    def test_an_interrupted_delivery_ends_what_is_left_of_its_command(self):
        script = self.script("slow", (
            "#!/bin/sh\n(trap '' TERM; exec sh -c \"sleep 0.3\necho \\$\\$ >%s/pid\n"
            "kill -USR1 $PPID\nexec sleep 60\") &\nexec sleep 60\n") % self.folder)
        with handling(signal.default_int_handler, signal.SIGUSR1):
            self.assertRaises(KeyboardInterrupt, self.run_command, script, timeout=0.15)
        self.wait_for_end(self.wait_for_pid())

    @unittest.skipUnless(os.geteuid() == 0, "not root")
    @unittest.skipUnless(shutil.which("setpriv"), "no setpriv")
    def test_one_that_cannot_be_ended_holds_nothing_up(self):
        self.limit(KILL_DELAY=0.02, MAX_UNENDED=1)
        command = msmtpd.Command(self.script("other", (
            "#!/bin/sh\ntest \"$(cat)\" = x || exit 0\nexec setpriv --reuid=65533 --clear-groups "
            "sh -c 'echo $$ >&3; exec sleep 60' 3>%s\n") % self.path("pid")), timeout=0.2)
        mail, other = (msmtpd.Mail("a@b", ["c@d"], data) for data in (b"x\n", b"y\n"))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.assert_fails, command, 451, "4.3.0", mail)
            pid = self.wait_for_pid()
            os.seteuid(65534)       # who may not send it a signal
            try:
                running.result()
            finally:
                os.seteuid(0)
        self.assertEqual(mail.outcome, "exit=timeout")
        os.kill(pid, 0)     # it runs on
        self.assertIn("do not end", str(self.assert_fails(command, 451, "4.3.0", other)))
        os.kill(pid, signal.SIGKILL)
        self.wait_for_end(pid)
        command(other)      # which reaps it
        self.assertRaises(ChildProcessError, os.waitpid, pid, os.WNOHANG)

    def test_children_left_behind_hold_nothing_up(self):
        script = self.script("fork", "#!/bin/sh\nsleep 60 <&0 &\necho $! > %s/pid\n" % self.folder)
        self.assertEqual(self.run_command(script)[1], "exit=0")
        os.kill(self.wait_for_pid(), signal.SIGKILL)
        script = self.script("fork", "#!/bin/sh\nyes >&2 &\nsleep 0.05\nexit 1\n")
        self.assertEqual(self.run_command(script)[1], "exit=1")     # never, if it reads to the end

    def output_of(self, text):
        """What a command writes to its standard output, run for a mail to nobody."""
        with tempfile.TemporaryFile("w+") as output:
            self.assertEqual(self.run_command(text, msmtpd.Mail("a@b"),
                                              stdout=output.fileno()), (None, "exit=0"))
            output.seek(0)
            return output.read()

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "no /proc")
    def test_what_it_inherits(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        os.set_inheritable(writer, True)
        # 3 is the folder that ls reads.
        self.assertEqual(self.output_of("ls /proc/self/fd").split(), ["0", "1", "2", "3"])
        status = self.output_of("cat /proc/self/status")
        ignored = int(re.search("SigIgn:(.*)", status).group(1), 16)
        self.assertEqual(ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1), 0)
        pid, group, session = self.output_of("cut -d' ' -f1,5,6 /proc/self/stat").split()
        self.assertEqual((group, session), (pid, pid))

    @unittest.skipUnless(HAS_POSIX_SPAWN, "no glibc 2.34")
    def test_its_signals_are_not_those_of_its_host(self):
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        lines = self.output_of("grep -h -e SigBlk -e SigIgn /proc/self/status /dev/null")
        blocked, ignored = (int(line.split()[1], 16) for line in lines.splitlines())
        self.assertEqual((blocked, ignored & (1 << 31) - 1), (0, 0))    # beyond are glibc's own

    def test_its_environment_is_that_of_when_it_was_made_and_names_the_user(self):
        with mock.patch.dict(os.environ, {"MSMTPD_TEST": "\udcff before", "MSMTPD_USER": "root"}):
            command = msmtpd.Command(
                "sh -c 'printf \"%%s \" \"$MSMTPD_TEST\" \"${MSMTPD_USER-none}\" > %s/out'"
                % self.folder)
        for user, shown in ((None, b"none"), ("joe", b"joe"), ("j\u00f6 $(e)", b"j\xc3\xb6 $(e)"),
                            (None, b"none")):
            with self.subTest(user):
                command(msmtpd.Mail("a@b", ["c@d"], user=user))
                with open(self.path("out"), "rb") as file:
                    self.assertEqual(file.read(), b"\xff before %b " % shown)

    def test_where_its_host_lacks_a_descriptor(self):
        command = msmtpd.Command(self.capture)
        for number in range(3):
            def run(number=number):
                os.close(number)
                self.assert_fails(command, 451, "4.3.0")
                with self.assertRaisesRegex(ValueError, "closed"):
                    msmtpd.Command(self.capture)
            with self.subTest(number):
                self.assertEqual(in_fork(run), 0)
        self.assertEqual(self.delivered(), [])
        with self.assertRaises(ValueError):
            msmtpd.Command(self.capture, stdout=0)

    def test_a_lost_status_is_no_success(self):
        command, mail = msmtpd.Command("true"), msmtpd.Mail("a@b", ["c@d"], b"x\n")
        with handling(signal.SIG_IGN, signal.SIGCHLD):
            self.assert_fails(command, 451, "4.3.0", mail)
            with self.assertRaisesRegex(ValueError, "SIGCHLD"):     # or clients would try for ever
                msmtpd.Command("true")
        self.assertEqual(mail.outcome, "exit=lost")

    def test_no_descriptor_is_left_open(self):
        gone = msmtpd.Command(self.script("gone", "#!/bin/sh\n"))
        os.remove(self.path("gone"))
        before = open_descriptors()
        for size in (1, 100000, 2000000):
            for text in ("true", "false", "nosuchprogram", "cat >/dev/null; true"):
                self.run_command(text, msmtpd.Mail("a@b", ["c@d"], b"x" * size))
            with self.assertRaises(msmtpd.TemporaryFailure):
                gone(msmtpd.Mail("a@b", ["c@d"], b"x" * size))
        self.assertEqual(open_descriptors(), before)

    def test_where_python_has_no_ctypes(self):
        with mock.patch.dict(sys.modules, ctypes=None):
            for test in (self.test_arguments_and_input, self.test_signals,
                         self.test_what_cannot_be_started, self.test_what_it_inherits,
                         self.test_a_lost_status_is_no_success,
                         self.test_its_environment_is_that_of_when_it_was_made_and_names_the_user,
                         self.test_no_descriptor_is_left_open):
                shutil.rmtree(self.path("mails"))
                os.mkdir(self.path("mails"))
                test()

    @unittest.skipUnless(sys.platform == "linux", "the stack's limit bounds it on Linux")
    def test_no_more_recipients_are_accepted_than_a_command_line_holds(self):
        """Linux takes a quarter of the stack's limit, the environment included: execve(2)."""
        recipients = ["%060d@%s.example" % (number, ".".join(["d" * 60] * 3))
                      for number in range(990)]
        for text, filling, least in (("%s -f %%F --", 20000, 850), ("X=1 %s -f %%F --", 20000, 850),
                                     ("%s -f %%F --", 120000, 450)):
            with self.subTest(text, filling=filling), \
                    mock.patch.dict(os.environ, MSMTPD_TEST="x" * filling), \
                    soft_limit(resource.RLIMIT_STACK, 1024 * 1024), \
                    msmtpd.Server(msmtpd.Command(text % self.capture)) as server, \
                    Client(server) as client:
                client.open("MAIL FROM:<a@example.org>")
                client.send("".join("RCPT TO:<%s>\r\n" % each for each in recipients))
                replies = [client.reply()[0][:9] for _ in recipients]
                taken = replies.count("250 2.1.5")
                self.assertEqual(replies[taken:], ["452 4.5.3"] * (990 - taken))
                self.assertIn(taken, range(least, 990))
                self.assertEqual(client.do("DATA", "x\r\n.")[:9], "250 2.0.0")
                self.assertEqual(self.delivered()[-1][0],
                                 ["-f", "a@example.org", "--", *recipients[:taken]])


# Authentication

def encoded(text, encoding="utf-8"):
    return base64.b64encode(text.encode(encoding)).decode()


class Authentication(ServerCase):
    """RFC 4954 with PLAIN (RFC 4616) and LOGIN."""

    RIGHT, WRONG = encoded("\0user\0secret"), encoded("\0user\0wrong")

    def setUp(self):
        super().setUp()
        self.limit(AUTH_DELAY=0.0)

    def serve(self, deliver=None, **options):
        options.setdefault("authenticate", msmtpd.one_user("user", "secret"))
        return super().serve(deliver, **options)

    def test_dialogue(self):
        mails = self.check_dialogue("""\
            S: 220
            C: AUTH PLAIN %s
            S: 503 5.5.1
            C: EHLO x
            S: 250-
            S: 250-
            S: 250-
            S: 250-
            S: 250-
            S: 250-
            S: 250 AUTH PLAIN LOGIN
            C: MAIL FROM:<a@b>
            S: 530 5.7.0
            C: AUTH
            S: 504 5.5.4
            C: AUTH CRAM-MD5
            S: 504 5.5.4
            C: AUTH PLAIN
            S: 334
            C: *
            S: 501 5.5.2
            C: AUTH PLAIN %s
            S: 535 5.7.8
            C: auth plain
            S: 334
            C: %s
            S: 235 2.7.0
            C: AUTH PLAIN
            S: 503 5.5.1
            C: HELO x
            S: 250
            C: MAIL FROM:<a@b>
            S: 250
            C: RCPT TO:<c@d>
            S: 250
            C: DATA
            S: 354
            C: x
            C: .
            S: 250
            C: QUIT
            S: 221
            """ % (self.RIGHT, self.WRONG, self.RIGHT), received=True)
        self.assertEqual(mails[0].user, "user")
        self.assertIn(b"with ESMTPA;", mails[0].data)

    def test_exchanges(self):
        pairs = ("j\u00f6", "\u00fc"), ("user", "secrets"), ("user", "p" * 8000)
        server = self.serve(authenticate=lambda *pair: pair in pairs, auth_required=False)
        user, password = encoded("j\u00f6"), encoded("\u00fc")
        right = encoded("\0user\0secrets")     # which ends in two =
        for lines in (
                ("AUTH LOGIN", "334 VXNlcm5hbWU6", user, "334 UGFzc3dvcmQ6", password, "235 2.7.0"),
                ("auth login " + user, "334 UGFzc3dvcmQ6", password, "235 2.7.0"),
                ("AUTH LOGIN  " + user, "334 UGFzc3dvcmQ6", "*", "501 5.5.2"),
                ("AUTH LOGIN =", "334 UGFzc3dvcmQ6", password, "535 5.7.8"),
                ("AUTH LOGIN", "334 VXNlcm5hbWU6", "us!", "501 5.5.2"),
                ("MAIL FROM:<a@b>", "250", "AUTH PLAIN", "503 5.5.1"),
                # White space and a missing end, as the libraries of some devices send them.
                ("AUTH PLAIN " + right[:-2], "235"), ("AUTH PLAIN\t" + right[:-1] + "\t", "235"),
                ("AUTH PLAIN", "334", " " + right[:-2] + " \t", "235"),
                ("AUTH LOGIN", "334", encoded("user")[:-2] + " \r", "334",
                 "\t" + encoded("secrets")[:-1], "235"),
                # Latin-1, as of Emacs and Tcl; also one by one, an old name with a new password.
                ("AUTH PLAIN " + encoded("\0j\u00f6\0\u00fc", "latin-1"), "235"),
                ("AUTH LOGIN", "334", encoded("j\u00f6", "latin-1"), "334",
                 encoded("\u00fc", "latin-1"), "235"),
                ("AUTH LOGIN " + encoded("j\u00f6", "latin-1"), "334", password, "235"),
                # Another identity to act as, and long responses.
                ("auth plain " + encoded("someone\0user\0" + "p" * 8000), "235"),
                ("AUTH PLAIN", "334", encoded("\0user\0" + "p" * 8000), "235"),
                ("AUTH PLAIN", "334", "x" * 12287, "500 5.5.2", "NOOP", "250"),
                # A web page's.
                ("AUTH LOGIN", "334", "POST / HTTP/1.1", "421 4.7.0")):
            with self.subTest(lines), Client(server) as client:
                client.open()
                for sent, answer in zip(lines[::2], lines[1::2]):
                    self.assertEqual(client.do(sent)[:len(answer)], answer)
                if answer[:3] == "421":
                    self.assertEqual(client.rest(), "")

    def test_helo_will_do_as_the_greeting_and_the_challenge_of_plain_is_empty(self):
        """Clients that read one line a reply say no EHLO, such as small devices."""
        with Client(self.serve()) as client:
            client.reply()
            self.assertEqual(client.do("HELO x", "AUTH LOGIN"), "334 VXNlcm5hbWU6")
            self.assertEqual(client.do("*", "AUTH PLAIN"), "334 ")
            self.assertEqual(client.do(self.RIGHT)[:9], "235 2.7.0")
            self.assertEqual(client.do("MAIL FROM:<a@b>")[:3], "250")

    def test_responses_that_are_none(self):
        self.limit(MAX_ERRORS=100)
        with Client(self.serve()) as client:
            client.open()
            for response in (self.RIGHT[:5] + "!" + self.RIGHT[5:], self.RIGHT[:5] + " "
                             + self.RIGHT[5:], "YW-_", self.RIGHT + "\u00fc", "A",
                             encoded("user\0secret"),
                             encoded("\0user\0secret\0x")):
                for lines in ["AUTH PLAIN " + response], ["AUTH PLAIN", response]:
                    with self.subTest(lines):
                        self.assertEqual(client.do(*lines)[:9], "501 5.5.2")
            self.assertEqual(client.do("AUTH PLAIN " + self.RIGHT)[:3], "235")

    def test_failures_are_among_the_ten_errors(self):
        """Three are too few: a client spends two on one mistyped password."""
        def own_words(user, password):
            raise msmtpd.PermanentFailure("Expired", 535)

        def fail_for_good(client):
            began = time.monotonic()
            self.assertEqual(client.do("AUTH PLAIN " + self.WRONG)[:9], "421 4.7.0")
            self.assertEqual(client.rest(), "")
            return time.monotonic() - began
        clients = []
        for authenticate in msmtpd.one_user("user", "secret"), own_words:
            client = self.client(self.serve(authenticate=authenticate))
            clients.append(client)
            client.open()
            for lines in ["AUTH PLAIN " + self.WRONG], ["nonsense"], ["AUTH PLAIN", self.WRONG]:
                for _ in range(3):
                    self.assertIn(client.do(*lines)[:4], ("535 ", "500 "))
        self.limit(AUTH_DELAY=0.06)
        self.assertGreaterEqual(min(at_once(fail_for_good, clients)), 0.06)

    def test_failures_make_all_answers_late(self):
        self.limit(AUTH_DELAY=0.2, AUTH_MEMORY=0.45)
        server = self.serve()

        def seconds(answer, *lines):
            with Client(server) as client:
                client.open(*lines[:-1])
                began = time.monotonic()
                self.assertEqual(client.do(lines[-1])[:len(answer)], answer)
                return time.monotonic() - began
        self.assertLess(seconds("235 ", "AUTH PLAIN " + self.RIGHT), 0.2)
        self.assertGreaterEqual(seconds("535 ", "AUTH PLAIN " + self.WRONG), 0.2)
        forgotten = time.monotonic() + 0.25     # at the latest, as it was 0.2 ago
        late, prompt = at_once(lambda lines: seconds(*lines), (
            ("235 ", "AUTH PLAIN", self.RIGHT), ("334 ", "AUTH LOGIN", encoded("user"))))
        self.assertGreaterEqual(late, 0.2)
        self.assertLess(prompt, 0.2)
        time.sleep(max(0, forgotten - time.monotonic()))
        self.assertLess(seconds("235 ", "AUTH PLAIN " + self.RIGHT), 0.2)

    def test_only_the_right_pair(self):
        check = msmtpd.one_user("\u00fcser", "s\u00e9cret")
        self.assertTrue(check("\u00fcser", "s\u00e9cret"))
        for user, password in (("\u00fcser", ""), ("", "s\u00e9cret"), ("", ""), ("user", "secret"),
                               ("\u00fcser", "s\u00e9cret "), ("\u00fcser ", "s\u00e9cret")):
            self.assertFalse(check(user, password))
        self.assertFalse(msmtpd.one_user("\udcff", "x")("user", "x"))

    def test_only_true_is_a_yes(self):
        async def later():
            return True
        for answer in None, "no", object(), later():
            authenticate = mock.MagicMock(return_value=answer)
            authenticate.__bool__.return_value = False      # as of a table that is empty yet
            with self.subTest(answer), Client(self.serve(authenticate=authenticate)) as client:
                self.assertEqual(client.open("AUTH PLAIN " + self.RIGHT)[:3], "535")
        answer.close()

    def test_what_is_empty_is_never_right(self):
        """RFC 4616 section 2. A directory that binds without a name would say yes."""
        self.limit(MAX_ERRORS=100)
        yes = mock.Mock(return_value=True, spec=())
        with Client(self.serve(authenticate=yes)) as client:
            client.open()
            for lines in (["AUTH PLAIN " + encoded("\0user\0")], ["AUTH PLAIN " + encoded("\0\0x")],
                          ["AUTH LOGIN " + encoded("user"), ""],
                          ["AUTH LOGIN " + encoded("user"), "="],
                          ["AUTH LOGIN", "", encoded("x")], ["AUTH PLAIN " + encoded("a\0\0")]):
                with self.subTest(lines):
                    self.assertEqual(client.do(*lines)[:9], "535 5.7.8")
            self.assertEqual(client.do("MAIL FROM:<a@b>")[:3], "530")
        yes.assert_not_called()

    def test_log_says_who_failed_and_who_sent(self):
        server = self.serve(authenticate=lambda user, password: password == "secret")
        with self.assertLogs("msmtpd") as logs:
            with Client(server) as client:
                client.open("AUTH PLAIN " + self.WRONG,
                            "AUTH PLAIN " + encoded("\0jo\ne x\0secret"), "MAIL FROM:<a@b>",
                            "RCPT TO:<c@d>", "DATA", "x\r\n.", "QUIT")
            server.stop()
        messages = [record.getMessage() for record in logs.records]
        self.assertIn("session 1: authentication failed client=[127.0.0.1]", messages)
        line, = (message for message in messages if "mail from=<a@b> to=<c@d> " in message)
        self.assertRegex(line, r" status=sent .*seconds=[0-9.]+ client=\[127\.0\.0\.1\] "
                               r"user=jo[^\n]+e.x\Z")


class AuthenticationByTheProgram(ProgramCase):
    """The password is nowhere but in its memory, which is short under inetd."""

    SECRET = "pa55-in-no-log"

    def assert_no_secret(self, text):
        """The password does not show, nor the base64 of it in one of its three phases."""
        text = text.lower()     # a verb is shown in upper case
        self.assertNotIn(self.SECRET, text)
        for padding in range(3):
            coded = base64.b64encode(b"x" * padding + self.SECRET.encode()).decode()
            self.assertNotIn(coded[4 if padding else 0:-4].lower(), text)

    def test_password_is_in_no_log_environment_or_argument(self):
        spy = self.script("spy", "#!/bin/sh\n{ env; tr '\\0' '\\n' </proc/$$/cmdline; "
                                 "tr '\\0' '\\n' </proc/$PPID/cmdline; "
                                 "tr '\\0' '\\n' </proc/$PPID/environ; } >>%s 2>&1\n"
                                 "echo failing >&2; exit 1\n" % os.path.join(self.folder, "seen"))
        source = os.path.join(self.folder, "password")
        with open(source, "w", encoding="ascii") as file:
            file.write(self.SECRET + "\n")
        process = self.start("--debug", "--auth=user,cat " + source, "--command=%s --" % spy,
                             limits={"AUTH_DELAY": 0.0})
        plain = encoded("\0user\0" + self.SECRET)
        user, word = encoded("user"), encoded(self.SECRET)
        for lines in (["AUTH PLAIN " + plain], ["AUTH PLAIN", plain], ["auth  plain  " + plain],
                      ["AUTH\tPLAIN\t" + plain], [" AUTH PLAIN " + plain],
                      ["AUTH LOGIN", user, word], ["AUTH LOGIN " + user, word],
                      ["AUTH PLAIN " + plain[:-3] + "*"], ["AUTH LOGIN", user, "*", word],
                      ["AUTH " + plain, plain, word, self.SECRET],
                      ["AUTH PLAIN " + plain, "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA",
                       "x\r\n."]):
            with Client(process) as client:
                client.open(*lines)
        self.assertEqual(self.stop(process)[0], 0)
        seen = self.logged()
        for shown in ("authenticated as user", "(hidden)", "C: MAIL FROM:<a@b>",
                      "S: 250 2.1.0 Sender accepted"):
            self.assertIn(shown, seen)
        with open(os.path.join(self.folder, "seen"), encoding="utf-8", errors="replace") as file:
            seen += file.read()
        self.assertIn("MSMTPD_USER=user", seen)
        self.assert_no_secret(seen)

    def test_under_inetd_every_answer_is_late(self):
        """A process for each client cannot remember the failures of others."""
        began = time.monotonic()
        done = self.run_program(
            "--inetd", "--auth=user,printf secret", "--command=true", limits={"AUTH_DELAY": 0.06},
            input=b"EHLO x\r\nAUTH PLAIN %b\r\nQUIT\r\n" % Authentication.RIGHT.encode())
        self.assertGreaterEqual(time.monotonic() - began, 0.06)
        self.assertIn(b"\r\n235 2.7.0", done.stdout)
        self.assertEqual(done.returncode, 0)


# Serving

class Slots(ServerCase):
    """Sessions are bounded, and nobody can keep others out."""

    MAIL = "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n."

    def is_silent(self, client, seconds):
        return not select.select([client.socket], [], [], seconds)[0]

    def test_small_talk_gives_way_too_but_no_transaction(self):
        self.limit(FULL_TIMEOUT=0.12, TURN=0.05)
        server = self.serve(max_sessions=2)
        with Client(server) as talker, Client(server) as sender, Client(server) as other:
            talker.open()
            sender.open(*self.MAIL[:2])
            end = time.monotonic() + 3
            reply, verbs = "250", itertools.cycle(("NOOP", "RSET"))
            while reply[:3] == "250":
                self.assertLess(time.monotonic(), end, "small talk holds a slot for good")
                self.assertEqual(sender.do("NOOP")[:3], "250")
                self.is_silent(talker, 0.03)
                reply = talker.do(next(verbs))
            self.assertEqual(reply[:9], "421 4.4.2")
            talker.close()
            self.assertEqual(other.reply(), ["220 localhost ESMTP msmtpd"])
            self.assertEqual(sender.do(*self.MAIL[2:])[:3], "250")

    def test_delay_of_auth_is_not_the_clients(self):
        self.limit(FULL_TIMEOUT=0.3, TURN=0.05, AUTH_DELAY=0.2)
        server = self.serve(max_sessions=1, authenticate=msmtpd.one_user("user", "secret"))
        with Client(server) as client, Client(server):
            self.assertEqual(client.open("AUTH PLAIN " + Authentication.WRONG)[:3], "535")
            self.assertEqual(client.do("AUTH PLAIN " + Authentication.RIGHT)[:3], "235")
            self.assertEqual(client.do(*self.MAIL)[:3], "250")

    def test_further_clients_wait_and_then_a_farewell_is_short(self):
        server = self.serve(max_sessions=1)
        with Client(server) as first, Client(server) as second:
            first.open()
            self.assertTrue(self.is_silent(second, 0.05))
            self.assertEqual(first.do("GET / HTTP/1.1")[:9], "421 4.7.0")
            began = time.monotonic()        # and `first` does not close
            self.assertEqual(second.reply(), ["220 localhost ESMTP msmtpd"])
            self.assertLess(time.monotonic() - began, 0.8)

    def test_silent_clients_stay_while_there_is_room(self):
        self.limit(FULL_TIMEOUT=0.1, TURN=0.05, PARTING_TIMEOUT=0.01)
        server = self.serve(max_sessions=2)
        with Client(server) as client:
            client.open()
            self.assertTrue(self.is_silent(client, 0.14))
            with Client(server) as other:       # one that is not silent has the last place
                other.open("MAIL FROM:<a@b>")
                end = time.monotonic() + 5
                while self.is_silent(client, 0.02):
                    self.assertEqual(other.do("NOOP")[:3], "250")
                    self.assertLess(time.monotonic(), end, "nobody looks again")
            self.assertEqual(client.rest()[:9], "421 4.4.2")

    def test_clients_of_all_listeners_get_their_turn(self):
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        server = self.serve(sockets=listeners, max_sessions=3)
        for peer in server.addresses * 2:
            clients = [self.client((peer.host, peer.port)) for _ in range(5)]
            for client in clients:      # the last two wait until others have left
                client.send("EHLO x\r\n%s\r\nQUIT\r\n" % "\r\n".join(self.MAIL))
            for client in clients:
                self.assertEqual(client.rest().splitlines()[-1], "221 2.0.0 Goodbye")
        self.assertEqual(len(self.mails), 30)

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "no Unix sockets")
    def test_unix_sockets(self):
        path = os.path.join(self.new_folder(), "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        server = self.serve(sockets=[listener], received=True)
        self.assertEqual(server.addresses, [msmtpd.Peer("", None)])
        with self.assertLogs("msmtpd") as logs, \
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
            client.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
                           b"DATA\r\nx\r\n.\r\nQUIT\r\n")
            self.assertEqual(client.makefile("rb").read()[-21:], b"\r\n221 2.0.0 Goodbye\r\n")
        self.assertEqual(self.mails[0].peer, msmtpd.Peer("", None))
        self.assertTrue(self.mails[0].data.startswith(b"Received: from x\n\tby localhost"))
        self.assertNotRegex("\n".join(logs.output), "client=|user=")

    @unittest.skipUnless(hasattr(socket, "TCP_QUICKACK"), "ACKs that cannot be late")
    def test_small_replies_are_not_held_back(self):
        """Nagle's algorithm would wait with each second one for a client's late ACK, 40 ms."""
        class Talker(msmtpd.Session):
            def do_NOOP(self, argument):
                for number in range(2):
                    self.send(msmtpd.Reply(250, "2.0.0", "Here %d" % number))
                    self.flush()
        with Client(self.serve(session=Talker)) as client:
            client.open()
            began = time.monotonic()
            for _ in range(50):
                client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
                self.assertEqual([client.do("NOOP"), *client.reply()],
                                 ["250 2.0.0 Here 0", "250 2.0.0 Here 1"])
            self.assertLess(time.monotonic() - began, 1.5)      # late ACKs take 2

    @needs_ipv6
    def test_both_families(self):
        """:: is for both, and several interfaces share a free port."""
        for hosts in ("::",), ("127.0.0.1", "::", "127.0.0.1"), ("::", "127.0.0.1"):
            server = self.serve(host=hosts)
            self.assertEqual([peer.host for peer in server.addresses], list(dict.fromkeys(hosts)))
            for place in "127.0.0.1", "::1":
                with Client((place, server.port)) as client:
                    client.open(*self.MAIL)
                self.assertEqual(self.mails[-1].peer.host, place)


class Scarcity(ProgramCase):
    """What is not to be had for the moment is waited for."""

    def errors(self):
        return self.logged().count(" error: ")

    @unittest.skipUnless(hasattr(resource, "prlimit"), "no prlimit")
    def test_descriptors(self):
        """It is tried less and less often; each time that it begins to fail is logged once."""
        process = self.start()
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        used = set(map(int, os.listdir("/proc/%d/fd" % process.pid)))
        lowest = next(number for number in itertools.count() if number not in used)

        def limit(soft):
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (soft, before[1]))

        def ticks():
            with open("/proc/%d/stat" % process.pid, encoding="ascii") as file:
                return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        limit(lowest)
        with Client(process) as client:
            wait_for(lambda: self.errors() == 1, "the error to be logged")
            spent = ticks()
            self.assertEqual(select.select([client.socket], [], [], 0.15)[0], [])
            self.assertLess(ticks() - spent, 0.08 * os.sysconf("SC_CLK_TCK"), "it spins")
            limit(before[0])
            self.assertEqual(client.open("QUIT")[:3], "221")
        self.assertEqual(self.errors(), 1)
        limit(lowest)
        with Client(process):
            wait_for(lambda: self.errors() == 2, "the error to be logged")
            self.assertEqual(self.stop(process)[0], 0)

    @unittest.skipUnless(sys.platform == "linux", "how much memory a thread takes")
    def test_threads(self):
        def little_memory():
            resource.setrlimit(resource.RLIMIT_AS, (160 << 20, 160 << 20))
        process = self.start("--max-sessions=64", real=True, preexec_fn=little_memory)
        with contextlib.ExitStack() as clients:
            opened = [clients.enter_context(Client(process)) for _ in range(64)]
            self.assertEqual(opened[0].open()[:3], "250")
            wait_for(self.errors, "the want of threads to be logged")
        for _ in range(3):
            self.assertEqual(self.send(process)[:3], "250")
        self.assertEqual(self.stop(process)[0], 0)


# Security

NOTE = """\
#!/bin/sh
# Notes its arguments, one a line and an empty line behind them, faster than the script for mails.
{ printf '%s\\n' "$@"; echo; } >> "${0%/*}/noted"
"""


class Injection(ProgramCase):
    """Whatever the command line looks like, an address is never code."""

    def commands(self):
        """The command lines, and whether what means something to a shell gets through."""
        fake = self.script("ssh", '#!/bin/sh\nshift\nexec sh -c "$*"\n')    # as the real one
        keep = self.script("keep", NOTE)
        return [
            ("%s -f %%F --" % keep, True), ("%s --from=%%F --" % keep, True),
            ("%s -f '%%F' --" % keep, True), ("%s -f '<%%F>' --" % keep, False),
            ("X=1 %s -f '%%F' --" % keep, False),
            ('X=1 %s -f "%%F" --' % keep, False), ("X=`echo %%F` %s --" % keep, False),
            ("sh -c '%s -f %%F -- \"$@\"' sh" % keep, False),
            ("env sh %s -f %%F --" % keep, False),
            ("%s host %s -f %%F --" % (fake, keep), False),
            ("env A=b %s -f %%F --" % keep, True),
        ]

    def hold(self, client, lets_by):
        """Offer all addresses; return those that were let by, as the command must have got them."""
        passed = []
        for local in HOSTILE:
            path = local + "@example.org"
            reply = client.do("MAIL FROM:<%s>" % path)
            if lets_by:
                passed.append(path)
                self.assertEqual(reply[:3], "250", path)
                self.assertEqual(client.do("RCPT TO:<%s>" % path)[:3], "250", path)
                self.assertEqual(client.do("DATA", "x\r\n.")[:3], "250", path)
            else:
                self.assertRegex(reply, r"\A553 5\.1\.7 ", path)
                reply = client.do("MAIL FROM:<a@example.org>", "RCPT TO:<%s>" % path)
                self.assertRegex(reply, r"\A553 5\.1\.3 ", path)
                client.do("RSET")
        # What is inert passes everywhere.
        self.assertEqual(client.do("MAIL FROM:<a+b=%F%F@x.org>", "RCPT TO:<root>",
                                   "RCPT TO:<%F@x.org>", "DATA", "x\r\n.")[:3], "250")
        return passed

    def test_nothing_is_executed(self):
        noted = os.path.join(self.folder, "noted")
        for command, lets_by in self.commands():
            with self.subTest(command=command):
                with msmtpd.Server(msmtpd.Command(command)) as server, Client(server) as client:
                    client.open()
                    passed = self.hold(client, lets_by)
                with open(noted, encoding="utf-8") as file:
                    mails = [text.split("\n") for text in file.read()[:-2].split("\n\n")]
                os.unlink(noted)
                self.assertEqual([words[-1] for words in mails], [*passed, "%F@x.org"])
                self.assertEqual(mails[-1][-2:], ["root", "%F@x.org"])
                for path, words in zip(passed, mails):
                    self.assertIn(words[:-1], (["-f", path, "--"], ["--from=" + path, "--"]))
                self.assertEqual([name for _, folders, files in os.walk(self.folder)
                                  for name in folders + files if "HIT" in name], [])
                self.assertFalse(os.path.exists("HIT"))


# The library

class LibraryCase(ServerCase):
    """Tests of msmtpd.Server, each of which leaves no thread of a server's."""

    def setUp(self):
        super().setUp()
        self.threads = threading.active_count()
        self.addCleanup(lambda: wait_for(lambda: self.more_threads() <= 0, "all threads to end"))
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)
        self.addCleanup(self.release.set)

    def more_threads(self):
        """How many threads there are beyond those that were there before."""
        return threading.active_count() - self.threads

    def stuck(self, mail):
        """A deliver that does not return before self.release."""
        self.entered.release()
        self.release.wait(PATIENCE)
        self.mails.append(mail)

    def wait_for_stuck(self):
        self.assertTrue(self.entered.acquire(timeout=PATIENCE))

    def thread(self, function, *arguments):
        """Call a function in a thread; return the thread, which has to end before the test does."""
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self.addCleanup(self.join, thread)
        return thread

    def join(self, thread):
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def in_data(self, server):
        """A client that has come to the mail data."""
        client = self.client(server)
        self.assertEqual(client.data()[:3], "354")
        return client

    def sender(self, server):
        """A client that has sent a mail, and not yet read the reply."""
        client = self.in_data(server)
        client.send("x\r\n.\r\n")
        return client

    def check_replies(self, table, handler=lambda deliver: deliver, **options):
        """Hold a table of what `deliver` raises or returns, and what the client is told then."""
        def deliver(*mail, **options):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome
        self.limit(MAX_ERRORS=3)        # what `deliver` refuses is none of the client's
        with msmtpd.Server(handler(deliver), **options) as server, Client(server) as client:
            client.open()
            for outcome, reply in table:
                with self.subTest(outcome=repr(outcome)):
                    client.do("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                    self.assertEqual(client.do("x\r\n."), reply)
            self.assertEqual(client.do("NOOP"), "250 2.0.0 Here")


class StartingAServer(LibraryCase):
    def test_arguments_that_make_no_sense_are_refused_before_it(self):
        for options in ({"deliver": None}, {"host": None}, {"host": ()},
                        {"host": ("127.0.0.1", 25)}, {"port": -1}, {"port": 65536}, {"port": "25"},
                        {"authenticate": {"user": "password"}}, {"starttls": False},
                        {"check": "x"}, {"max_size": -1}, {"max_sessions": 0}, {"timeout": 0},
                        {"timeout": float("nan")}, {"log": "name"}):
            with self.subTest(options), self.assertRaisesRegex((TypeError, ValueError),
                                                               r"\b%s\b" % list(options)[0]):
                msmtpd.Server(**dict({"deliver": print}, **options))

    @unittest.skipUnless(ssl, "no module ssl")
    def test_nor_is_a_context_taken_that_no_server_can_use(self):
        context, client_s = map(ssl.SSLContext, (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
        server = msmtpd.Server(print, tls=context)
        for wrong in True, client_s, None:      # by which AUTH would be offered in plain text
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, r"\btls\b"):
                server.tls = wrong
        with self.assertRaisesRegex(ValueError, r"\btls\b"):
            msmtpd.Server(print, tls=client_s)
        self.assertIs(server.tls, context)

    def test_host_and_port_are_known_when_start_returns(self):
        second = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
        for host, hosts in (("127.0.0.1", ["127.0.0.1"]), (second, [second]),
                            ("localhost", ["127.0.0.1"]),
                            (("127.0.0.1", second), sorted({"127.0.0.1", second}))):
            with self.subTest(host=host):
                server = self.serve(host=host)
                self.assertEqual([peer.host for peer in server.addresses], hosts)
                self.assertEqual((server.host, server.port), tuple(server.addresses[0]))
                for address in server.addresses:
                    with Client(tuple(address)) as client:
                        self.assertEqual(client.line(), "220 localhost ESMTP msmtpd")
                server.stop()

    def test_what_cannot_be_bound_is_an_error_at_once(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port, descriptors = taken.getsockname()[1], open_descriptors()
            for host, port in (("127.0.0.1", port), (("127.0.0.2", "127.0.0.1"), port),
                               ("192.0.2.1", 0), ("mail.example", 0), ("", 0), ("x" * 64, 0)):
                with self.subTest(host=host):
                    server = msmtpd.Server(print, host, port)
                    with self.assertRaises(OSError):
                        server.start()
                    with self.assertRaises(OSError), server:
                        self.fail("the block was entered")
                    server.stop()
                    self.assertEqual((self.more_threads(), open_descriptors()), (0, descriptors))

    def test_one_that_finds_no_thread_leaves_nothing(self):
        server, descriptors = msmtpd.Server(print), open_descriptors()
        self.addCleanup(threading.stack_size, threading.stack_size(1 << 40))    # no system has it
        with self.assertRaises((RuntimeError, MemoryError)):
            server.start()
        self.assertEqual((self.more_threads(), open_descriptors()), (0, descriptors))

    def test_started_once_at_a_time_and_stopped_as_often_as_one_likes(self):
        server = msmtpd.Server(print)
        server.stop()
        for _ in range(2):
            server.start()
            with self.assertRaises(RuntimeError):
                server.start()
            with server, Client(server) as client:      # a block for one that is started
                self.assertEqual(client.open(), "250-localhost")
            self.assertFalse(can_connect(server.port))
            server.stop()

    def test_of_two_at_the_same_moment_one_is_refused_and_none_leaves_anything(self):
        def start(server):
            together.wait(PATIENCE)
            try:
                return server.start()
            except RuntimeError:
                return "refused"
        descriptors, mails, port, together = open_descriptors(), [], 0, threading.Barrier(2)
        for _ in range(40):
            server = msmtpd.Server(mails.append, port=port, max_sessions=2)
            self.assertCountEqual(at_once(start, [server] * 2), [None, "refused"])
            port = server.port
            self.send_one(server)
            server.stop()
            self.assertEqual((self.more_threads(), open_descriptors()), (0, descriptors))
        self.assertEqual(len(mails), 40)


class StoppingAServer(LibraryCase):
    def test_whatever_clients_do(self):
        """Idle ones are told at once, the mute after the grace; who is stuck is left behind."""
        self.limit(STOP_PATIENCE=0.25)
        descriptors, server = open_descriptors(), self.serve(self.stuck)
        new, idle = self.client(server), self.client(server)
        idle.open("MAIL FROM:<a@example.org>")
        mute, stuck = self.in_data(server), self.sender(server)
        self.wait_for_stuck()
        with self.assertLogs("msmtpd", "ERROR") as log:
            began, ended = time.monotonic(), []
            stopping = self.thread(server.stop, 0.3)
            for client in new, idle, mute:
                self.assertEqual(client.rest().splitlines()[-1:], ["421 4.3.2 Shutting down"])
                ended.append(time.monotonic() - began)
            self.join(stopping)
        self.assertTrue(ended[1] < 0.3 <= ended[2] < 1, ended)
        self.assertTrue(0.55 <= time.monotonic() - began < 2)
        self.assertRegex("\n".join(log.output), r"\A.*:left behind: 1 session.*\Z")
        self.assertEqual(self.more_threads(), 1)
        server.start()      # which it does not disturb
        self.release.set()
        self.assertEqual(stuck.line(), "250 2.0.0 Delivered")
        for client in [self.client(server) for _ in range(4)]:
            self.assertEqual(client.line(), "220 localhost ESMTP msmtpd")
        self.doCleanups()   # the clients, the server, and that all threads end
        self.assertEqual(open_descriptors(), descriptors)

    def test_clients_that_never_pause(self):
        def talk(client, line):
            with contextlib.suppress(ConnectionError):
                while True:
                    client.send((line + "\r\n") * 10000)
        for grace, seconds in ((PATIENCE, 0.0), (0.1, 0.1)):
            server = self.serve()
            client = self.in_data(server) if seconds else self.client(server)
            talking = [self.thread(talk, client, "NOOP"), self.thread(client.rest)]
            began = time.monotonic()
            server.stop(grace)
            self.assertTrue(seconds <= time.monotonic() - began < PATIENCE / 2)
            for thread in talking:
                self.join(thread)

    def test_a_further_one_can_shorten_the_grace_and_not_lengthen_it(self):
        def stop_twice(case):
            server, client, graces = case
            began = time.monotonic()
            first = self.thread(server.stop, graces[0])
            wait_for(lambda: not can_connect(server.port), "the stop to begin")
            self.join(self.thread(server.stop, graces[1]))
            self.assertEqual(client.rest(), "421 4.3.2 Shutting down\r\n")
            self.join(first)
            self.assertLess(time.monotonic() - began, PATIENCE / 4)
        self.limit(STOP_PATIENCE=0.05)
        cases = []
        for graces in (PATIENCE, 0.0), (0.0, PATIENCE):
            server = self.serve(self.stuck)
            self.sender(server)
            self.wait_for_stuck()
            cases.append((server, self.in_data(server), graces))
        with self.assertLogs("msmtpd", "ERROR"):
            at_once(stop_twice, cases)
        self.release.set()

    def test_clients_that_wait_for_a_place(self):
        server = self.serve(max_sessions=1)
        first, second = self.client(server), self.client(server)
        first.open()        # and so takes the only one
        began = time.monotonic()
        self.join(self.thread(server.stop))
        self.assertLess(time.monotonic() - began, 1)
        self.assertEqual(first.rest().splitlines()[-1], "421 4.3.2 Shutting down")
        self.assertEqual(second.rest() or "", "")

    def test_no_listener_is_closed_in_the_middle_of_an_accept(self):
        """Or else that might accept from whatever gets the number of its descriptor.

        Nor does it wait where another process, which has inherited the listener, was faster.
        """
        class Listener(socket.socket):
            def accept(listener):
                if not taken:
                    taken.append(super().accept()[0])
                self.stuck(None)
                return super().accept()

            def close(self):
                closed.append(self.fileno())
                super().close()
        taken, closed, listener = [], [], Listener()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = self.serve(sockets=[listener])
        self.client(server)
        self.wait_for_stuck()
        stopping = self.thread(server.stop)
        stopping.join(0.05)
        self.assertEqual(closed, [])
        self.release.set()
        self.join(stopping)
        self.assertEqual(len(closed), 1)
        taken[0].close()

    def test_while_a_mail_is_delivered_the_client_has_a_moment_to_quit(self):
        """Or else smtplib would raise at the end of its `with`, and its mail be sent again."""
        server = self.serve(self.stuck)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self.send_one, server)
            self.wait_for_stuck()
            self.thread(server.stop, PATIENCE)
            wait_for(lambda: not can_connect(server.port), "the stop to begin")
            self.release.set()
            self.assertEqual(sent.result(PATIENCE), {})
        self.assertEqual(len(self.mails), 1)

    def test_inside_deliver_it_waits_for_nobody_and_outside_for_deliver(self):
        """Also where a start follows it: what waits ends with what it waited for, and no more."""
        def deliver(mail):
            self.entered.release()
            self.release.wait(PATIENCE)
            began = time.monotonic()
            server.stop(PATIENCE)
            self.assertLess(time.monotonic() - began, 1)
            held.append(not can_connect(server.port))
            server.start()
            waiting.join(0.02)              # the work that is left to do
            held.append(waiting.is_alive())
            self.mails.append(mail)

        for way in ("serve_forever", "stop"):
            with self.subTest(way=way):
                self.release.clear()
                self.mails, held = [], []
                server = msmtpd.Server(deliver, max_sessions=1)
                self.addCleanup(server.stop)
                if way == "serve_forever":      # which starts it
                    waiting = self.thread(server.serve_forever)
                    wait_for(lambda: server.port, "the server to listen")
                else:
                    server.start()
                client = self.sender(server)
                self.wait_for_stuck()
                if way == "stop":
                    waiting = self.thread(server.stop, PATIENCE)
                    wait_for(lambda: not can_connect(server.port), "the stop to begin")
                self.release.set()
                self.assertEqual(client.line(), "250 2.0.0 Delivered")
                self.assertEqual(client.do("QUIT")[:3], "221")
                self.join(waiting)
                self.assertEqual((len(self.mails), held), (1, [True, True]))
                for _ in range(2):
                    with Client(server) as client:
                        self.assertEqual(client.open("QUIT")[:3], "221")
                server.stop()
                self.assertFalse(can_connect(server.port))

    def test_a_signal_handler_may_do_it_or_raise(self):
        def interrupt():
            wait_for(lambda: server.port, "the server to listen")
            client.append(self.client(server))
            client[0].line()
            os.kill(os.getpid(), signal.SIGUSR1)
        for handler, expected in (
                (lambda number, frame: server.stop(0), contextlib.nullcontext()),
                (signal.default_int_handler, self.assertRaises(KeyboardInterrupt))):
            server, client = msmtpd.Server(print), []
            self.addCleanup(server.stop)
            with handling(handler, signal.SIGUSR1), expected:
                self.thread(interrupt)
                server.serve_forever()
            server.stop()
            self.assertEqual(client[0].line(), "421 4.3.2 Shutting down")

    def test_starts_stops_and_serve_forever_from_several_threads_leave_nothing(self):
        def play(seed):
            chance = random.Random(seed)
            for _ in range(25):
                if chance.random() < 0.3:
                    with contextlib.suppress(OSError), Client(server) as client:
                        client.socket.settimeout(0.5)   # Linux may forget who comes at a close
                        client.open()
                with contextlib.suppress(RuntimeError):     # it has been started already
                    chance.choice([server.start, lambda: server.stop(0)])()

        def serve():
            while not done.is_set():
                with contextlib.suppress(RuntimeError):
                    server.serve_forever()
        descriptors, done = open_descriptors(), threading.Event()
        server = self.serve(max_sessions=4)
        serving = [self.thread(serve) for _ in range(2)]
        at_once(play, range(4))
        done.set()

        def ended():
            server.stop(0)
            return not any(thread.is_alive() for thread in serving)
        wait_for(ended, "serve_forever to return")
        wait_for(lambda: not self.more_threads(), "the threads to end")
        self.assertFalse(can_connect(server.port))
        self.assertEqual(open_descriptors(), descriptors)


# What a program of somebody else's does with the library; argument: the module's name.
SELFTEST = """
import importlib, smtplib, sys
msmtpd = importlib.import_module(sys.argv[1])
def must(condition):
    if not condition:
        raise SystemExit("line %d of the script" % sys._getframe(1).f_lineno)
def authenticate(user, password):
    return password == "se"
mails = []
with msmtpd.Server(mails.append, authenticate=authenticate) as server:
    with smtplib.SMTP(server.host, server.port, "client", 20) as client:
        client.login("user", "se")
        for number in 4, 1 << 16:
            client.sendmail("a@example.org", ["b@example.org"], b"x\\r\\n" * number)
must([len(mail.data) for mail in mails] == [8, 2 << 16])
must(mails[0].message.get_payload() == "x\\n" * 4 and mails[1].user == "user")
del mails[:]
print("fine")
"""

# Takes from the standard library what Windows' has not, and makes the rest do what it does there.
WINDOWS = """
import logging, os, select, signal, socket, stat, subprocess, sys, tempfile, threading, time
tempfile.gettempdir()
for name in "ssl syslog pwd grp fcntl resource termios tty pty posix".split():
    sys.modules[name] = None
for module, names in {
        os: "fchmod fork get_blocking getuid geteuid getpgid killpg memfd_create pidfd_open "
            "posix_spawn setsid set_blocking wait4 WNOHANG WIFSIGNALED WTERMSIG WEXITSTATUS",
        select: "poll epoll kqueue devpoll",
        signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE pthread_sigmask setitimer",
        socket: "SO_REUSEPORT MSG_DONTWAIT", time: "clock_gettime"}.items():
    for name in names.split():
        vars(module).pop(name, None)
def no_descriptor(*arguments):
    raise AssertionError("a socket is no file descriptor")
os.read = os.write = os.dup = os.dup2 = os.pipe = no_descriptor
def sockets_only(readers, writers, errors, seconds=None, select=select.select, fstat=os.fstat):
    must(readers or writers)
    must(all(stat.S_ISSOCK(fstat(d).st_mode) for d in (*readers, *writers)))
    return select(readers, writers, errors, seconds)
select.select = sockets_only
del socket.SO_REUSEADDR     # which lets others take the port there
tempfile.TemporaryFile, os.O_TEMPORARY = tempfile.NamedTemporaryFile, 0
os.name, sys.platform = "nt", "win32"
""" + SELFTEST + """
server = msmtpd.Server(print)
server.start()
threading.Timer(0.1, server.stop).start()
server.serve_forever()
try:
    msmtpd.Command("cat --")
except ValueError as error:
    must("POSIX" in str(error))
else:
    must(False)
"""

# Says whether the import or the use of the library changed the process that it is in.
STATE = """
import locale, gc, logging, os, signal, socket, sys, threading, warnings
def state():
    return [[signal.getsignal(number) for number in sorted(signal.valid_signals())],
            signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.set_wakeup_fd(-1),
            logging.root.handlers[:], logging.root.level, logging.lastResort,
            vars(logging.getLogger("msmtpd")).copy(), locale.setlocale(locale.LC_ALL),
            dict(os.environ), os.getcwd(), os.umask(0o22), socket.getdefaulttimeout(),
            threading.excepthook, sys.excepthook, sys.unraisablehook, sys.path[:], sys.stdout,
            sys.stderr, gc.isenabled(), warnings.filters[:]]
os.umask(0o22)
import smtplib
before = state()
""" + SELFTEST + """
for old, new in zip(before, state()):
    must(old == new)
"""

# Forks while a server runs: neither process may wait for the other, or end the other's server.
FORK = """
import os, signal, smtplib, sys, time, warnings
import msmtpd
warnings.simplefilter("ignore")
server = msmtpd.Server(print)
server.start()
def must_serve():
    with smtplib.SMTP(server.host, server.port, "client", 5) as client:
        assert client.noop()[0] == 250
def fork(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return pid
must_serve()
assert os.waitpid(fork(server.stop), 0)[1] == 0
must_serve()
sleeps = fork(lambda: time.sleep(60))
must_serve()
began = time.monotonic()
server.stop(grace=60)
assert time.monotonic() - began < 5
os.kill(sleeps, signal.SIGKILL)
print("fine")
"""

# Forgets stop(), with one client idle, and one whose mail is never delivered.
FORGETFUL = """
import smtplib, threading, msmtpd
entered = threading.Event()
def deliver(mail):
    entered.set()
    threading.Event().wait()
server = msmtpd.Server(deliver)
server.start()
idle, sender = [smtplib.SMTP(server.host, server.port, "client", 20) for _ in range(2)]
sender.send(b"HELO a\\r\\nMAIL FROM:<a@b>\\r\\nRCPT TO:<c@d>\\r\\nDATA\\r\\nx\\r\\n.\\r\\n")
assert entered.wait(20)
print("fine")
"""

# Stops a server in time, with one client in mid-data and one whose mail is not delivered, where
# a package has replaced time or more; its words come in between.
REPLACED = """
import logging, smtplib, socket, sys, threading, time
clocks = [time.perf_counter]    # where nobody looks who replaces it
%s
import msmtpd
msmtpd.TURN = 0.1
def stop_in_time():
    def deliver(mail):
        entered.set()
        release.wait(20)
    entered, release = threading.Event(), threading.Event()
    server = msmtpd.Server(deliver, timeout=20)
    server.start()
    clients = [socket.create_connection((server.host, server.port), 20) for _ in range(2)]
    for client, end in zip(clients, ("", ".\\n")):
        client.sendall(b"HELO a\\nMAIL FROM:<a@b>\\nRCPT TO:<c@d>\\nDATA\\nx\\n" + end.encode())
    assert entered.wait(20)
    began = clocks[0]()
    logging.getLogger("msmtpd").addHandler(logging.NullHandler())   # who would hear of the second
    server.stop(0.2)
    assert clocks[0]() - began < 3, clocks[0]() - began
    assert b"421 4.3.2" in clients[0].makefile("rb").read()
    release.set()
def wait_for_timeout():
    with msmtpd.Server(print, timeout=0.3) as server:
        client = socket.create_connection((server.host, server.port), 20)
        assert b"421 4.4.2" in client.makefile("rb").read()
    server = msmtpd.Server(print)
    server.start()
    client = smtplib.SMTP(server.host, server.port, "client", 20)
    began = clocks[0]()
    server.stop()
    assert clocks[0]() - began < 0.5, clocks[0]() - began
    assert client.getreply()[0] == 421
    client.close()
def send(size):
    sizes = []
    with msmtpd.Server(lambda mail: sizes.append(len(mail.data))) as server:
        with smtplib.SMTP(server.host, server.port, "client", 20) as client:
            client.sendmail("a@example.org", ["b@example.org"], b"x" * size)
    assert sizes == [size + 1], sizes
%s
print("fine")
"""

GREEN = "send(500000)\nwait_for_timeout()\nstop_in_time()"
PACKAGES = {
    "gevent": ("from gevent import monkey\nmonkey.patch_all()", GREEN),
    "eventlet": ("import warnings\nwarnings.simplefilter('ignore')\n"
                 "import eventlet\neventlet.monkey_patch()", GREEN),
    "freezegun": ("import freezegun\nfreezegun.freeze_time('2026-01-01').start()",
                  "send(500000)\nstop_in_time()"),
    "time_machine": ("import time_machine\ntime_machine.travel(0, tick=False).start()",
                     "send(500000)\nstop_in_time()"),
    "pyfakefs": ("from pyfakefs.fake_filesystem_unittest import Patcher\nPatcher().__enter__()",
                 "send(142000)\nsend(500000)")}


class WhereItIsVendored(Case):
    """The same script in other surroundings, each in a process of its own."""

    def run_script(self, script, *options, path=HERE, name="msmtpd"):
        environment = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
        environment.pop("PYTHONWARNINGS", None)
        done = subprocess.run([sys.executable, *options, "-c", script, name], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
                              cwd=self.new_folder())
        return done.stdout.decode(), done.returncode

    def test_in_other_surroundings(self):
        folder = self.new_folder()
        package = os.path.join(folder, "project", "vendor")
        os.makedirs(package)
        shutil.copy(PROGRAM, os.path.join(package, "postbox.py"))
        surroundings = {
            "a package, under another name, without docstrings":
                ([SELFTEST, "-OO"], {"path": folder, "name": "project.vendor.postbox"}),
            "a process whose state stays as it was, and warnings are errors":
                ([STATE + "gc.collect()", "-W", "error", "-bb", "-X", "dev"], {}),
            "what Windows has": ([WINDOWS], {}),
            "a process that forks": ([FORK], {}),
            "a program that forgets to stop it": ([FORGETFUL], {})}

        def run(name):
            arguments, options = surroundings[name]
            return self.run_script(*arguments, **options)
        self.assertEqual(dict(zip(surroundings, at_once(run, surroundings))),
                         dict.fromkeys(surroundings, ("fine\n", 0)))

    def test_where_packages_replace_time_sockets_or_files(self):
        missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
        for name in PACKAGES.keys() - missing:
            with self.subTest(name):
                self.assertEqual(self.run_script(REPLACED % PACKAGES[name]), ("fine\n", 0))
        if missing:
            self.skipTest("no " + ", ".join(missing))


# What a type checker is asked, and what it has to say.
TYPES = """
import msmtpd
mail = msmtpd.Mail("a@example.org")
reveal_type(mail.peer.host)
reveal_type(mail.peer.port)
reveal_type(mail.data)
reveal_type(msmtpd.Server(print).addresses)
async def deliver(mail: msmtpd.Mail) -> None: ...
msmtpd.Server(deliver)
"""


class WhatTheDocumentationShows(LibraryCase):
    def test_help_tells_of_all_that_is_public_and_can_be_read_at_a_sitting(self):
        text = pydoc.render_doc(msmtpd, renderer=pydoc.plaintext)
        # From 3.13 on each argument of a long signature is shown in a line of its own.
        self.assertLess(re.sub(r"(?s)\(\n.*?\n[ |]*\)", "()", text).count("\n"), 600)
        for name in "hostname", "extensions", "send", "flush", "read_line", "close", "VERBS":
            self.assertIn(name, msmtpd.Session.__doc__)
        for name in msmtpd.__all__:
            value = getattr(msmtpd, name)
            self.assertRegex(text, r"\b%s\b" % name)
            self.assertTrue(name.isupper() or value.__doc__, name)
            for member, function in vars(value).items() if isinstance(value, type) else ():
                if isinstance(function, (types.FunctionType, property)) and member[0] != "_":
                    self.assertTrue(function.__doc__, (name, member))

    def test_the_examples_in_docstrings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)    # clients that are not closed
            result = doctest.testmod(msmtpd)
        self.assertGreaterEqual(result.attempted, 3)
        self.assertEqual(result.failed, 0)

    def readme(self):
        """The blocks of code of README's part for modules."""
        with open(os.path.join(HERE, "README"), encoding="utf-8") as file:
            part = file.read().partition("\nAS A MODULE")[2].partition("\nSECURITY")[0]
        example, fixtures, bridge = re.findall(r"(?m)(?:^    .*\n|^\n(?=    ))+", part)
        set_up, mark, fixture = fixtures.partition("    @pytest")
        return [textwrap.dedent(block) for block in (example, set_up, mark + fixture, bridge)]

    def test_the_example_that_the_module_begins_with_and_that_of_readme(self):
        block = re.search(r"(?m)^    import smtplib.*\n(    .*\n)+", msmtpd.__doc__).group()
        for example, printed in ((textwrap.dedent(block), r"b'Hi\n'"), (self.readme()[0], "x")):
            output = io.StringIO()
            with contextlib.redirect_stdout(output), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)    # one client is not closed
                exec(example, {})
            self.assertEqual(output.getvalue(), "a@example.org ['b@example.org'] %s\n" % printed)

    def test_the_fixture_for_unittest_and_the_bridge_of_readme(self):
        _, fixture, _, bridge = self.readme()
        names = {"msmtpd": msmtpd, "mailbox": mailbox}
        exec(fixture, names)

        class Fixture(unittest.TestCase):
            setUp = names["setUp"]

            def runTest(case):
                self.send_one(case.server)
                self.assertEqual(len(case.mails), 1)
        result = unittest.TestResult()
        unittest.TestSuite([Fixture(), Fixture()]).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (2, [], []))
        folder = os.path.join(self.new_folder(), "mails")
        for old, new in (('"mails"', repr(folder)), ("msmtpd.Server", "server = msmtpd.Server"),
                         (", port=2500).serve_forever()", ")")):
            self.assertIn(old, bridge)
            bridge = bridge.replace(old, new)
        exec(bridge, names)
        with names["server"] as server:
            self.send_one(server)
        self.assertEqual([mail["Subject"] for mail in mailbox.Maildir(folder)], ["hi"])

    @unittest.skipUnless(importlib.util.find_spec("pytest"), "no pytest")
    def test_the_fixture_for_pytest_of_readme(self):
        folder = self.new_folder()
        with open(os.path.join(folder, "test_it.py"), "w", encoding="utf-8") as file:
            file.write("import smtplib, msmtpd, pytest\n" + self.readme()[2] + textwrap.dedent("""
                @pytest.mark.parametrize("number", range(3))
                def test_mail(smtp, number):
                    with smtplib.SMTP(smtp[0].host, smtp[0].port, "client") as client:
                        client.sendmail("a@example.org", ["b@example.org"], "x")
                    assert [mail.data for mail in smtp[1]] == [b"x\\n"]
                """))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", folder],
            env=dict(os.environ, PYTHONPATH=HERE), cwd=folder, stdout=subprocess.PIPE)
        self.assertIn(b"3 passed", done.stdout)

    @unittest.skipUnless(shutil.which("mypy"), "no mypy")
    def test_types_are_those_that_mypy_shows(self):
        folder = self.new_folder()
        with open(os.path.join(folder, "script.py"), "w", encoding="utf-8") as file:
            file.write(TYPES)
        done = subprocess.run(["mypy", "--cache-dir", folder, "script.py"], stdout=subprocess.PIPE,
                              cwd=folder, env=dict(os.environ, MYPYPATH=HERE))
        told = re.findall(r'script\.py:(\d+): (?:note: Revealed type is "(.*)"|error)',
                          done.stdout.decode().replace("builtins.", ""))
        self.assertEqual(told, [("4", "str"), ("5", "int | None"), ("6", "bytes"),
                                ("7", "list[msmtpd.Peer]"), ("9", "")])


class SmtpdHandlers(LibraryCase):
    def test_replies_that_process_message_may_return(self):
        self.check_replies((
            (None, "250 2.0.0 Delivered"), ("", "250 2.0.0 Delivered"), ("250 Ok", "250 2.0.0 Ok"),
            ("250 2.6.0 Kept", "250 2.6.0 Kept"), ("451 later", "451 4.0.0 later"),
            ("550", "550 5.0.0 Delivery failed"), ("550 5.1.1 no", "550 5.1.1 no"),
            ("550 5 lines", "550 5.0.0 5 lines"), ("530 Log in", "530 5.7.0 Log in"),
            ("451-4.2.1 a\n451 b\r\n", "451 4.2.1 a b")), msmtpd.smtpd_handler)

    def test_arguments_as_smtpd_gave_them(self):
        for decode, data, options in (
                (False, "\u20ac\n.".encode(), {"mail_options": ["SIZE=9", "BODY=8BITMIME"],
                                               "rcpt_options": ["NOTIFY=NEVER"]}),
                (True, "\u20ac\n.", {})):
            process_message = mock.Mock(return_value=None)
            handler = msmtpd.smtpd_handler(process_message, decode_data=decode)
            client = self.client(self.serve(handler))
            client.open("MAIL FROM:<> SIZE=9 body=8BITMIME", "RCPT TO:<b@example.org> NOTIFY=NEVER",
                        "DATA")
            self.assertEqual(client.do("\u20ac\r\n..\r\n."), "250 2.0.0 Delivered")
            self.assertEqual(process_message.mock_calls, [mock.call(
                client.socket.getsockname(), "<>", ["b@example.org"], data, **options)])


temporary, permanent = msmtpd.TemporaryFailure, msmtpd.PermanentFailure
INTERNAL = "451 4.3.0 Internal error"


class WhatDeliverMakesOfAMail(LibraryCase):
    def test_codes_that_do_not_fit_are_refused_where_they_are_raised(self):
        for failure, good, bad in (
                (temporary, (400, 499, None, "4.1.20"),
                 (399, 500, 250, 450.5, True, "450", "5.1.1", "4.1", "4.1.1.1", "4.1.1000",
                  "4.1.1\n", " 4.1.1", "4.\u0663.0")),
                (permanent, (500, 599, None, "5.1.20"), (499, 600, 55, "4.1.1", "5.1.1 no"))):
            for code in good + bad:
                with self.subTest(failure=failure, code=code), contextlib.ExitStack() as stack:
                    if code in bad:
                        stack.enter_context(self.assertRaises(ValueError))
                    failure("x", **{"enhanced" if isinstance(code, str) else "code": code})

    def test_failures_say_what_the_client_is_told(self):
        self.check_replies((
            (temporary(), "451 4.3.0 Delivery failed"), (temporary("later"), "451 4.3.0 later"),
            (permanent(), "554 5.3.0 Delivery failed"), (permanent("no"), "554 5.3.0 no"),
            # A code alone says no more than is known.
            (temporary("x", 450), "450 4.0.0 x"), (permanent("full", 552), "552 5.0.0 full"),
            (permanent("STARTTLS first", 530), "530 5.7.0 STARTTLS first"),
            (permanent("no", 553), "553 5.0.0 no"),
            # An enhanced code is given, by itself or at the begin of the text, or is not wanted.
            (temporary("x", 452, "4.2.2"), "452 4.2.2 x"),
            (permanent("x", 554, "5.5.1"), "554 5.5.1 x"),
            (permanent("x", enhanced="5.7.1"), "554 5.7.1 x"),
            (permanent("5.1.1 no such user", 550), "550 5.1.1 no such user"),
            (temporary("4.2.2 full"), "451 4.2.2 full"),
            (permanent("4.1.1 x", 550), "550 5.0.0 4.1.1 x"),
            (permanent("5.1.1 x", 550, "5.7.1"), "550 5.7.1 5.1.1 x"),
            (permanent("x", 550, ""), "550 x"), (temporary("x", enhanced=""), "451 x"),
            (permanent("two\r\nlines\0\u20ac"), "554 5.3.0 two  lines??")))

    def test_what_it_returns_is_a_reply_only_where_it_looks_like_one(self):
        """As functions for aiosmtpd do; keys of mailboxes and names of files are none."""
        others = "451.M1P2", "4510", 250, "/451 x", "x 250 y", None, 0, True, [], b"451 x"
        self.check_replies([(value, "250 2.0.0 Delivered") for value in (*others, "250 2.0.0")] + [
            ("250 OK", "250 2.0.0 OK"), ("250 2.6.0 Kept as 7", "250 2.6.0 Kept as 7")])
        with self.assertLogs("msmtpd", "ERROR") as log:
            self.check_replies([(value, INTERNAL) for value in (
                "550 5.1.1 no", "451 later", "550-no", "550", False)])
        self.assertEqual(len(log.records), 5)
        self.assertIn("to refuse, raise", log.output[0])

    def test_any_other_exception_is_logged_and_its_text_kept_from_the_client(self):
        errors = [kind("secret") for kind in (RuntimeError, SystemExit, asyncio.CancelledError)]
        descriptors = open_descriptors()
        with self.assertLogs("msmtpd", "ERROR") as log:
            self.check_replies([(error, INTERNAL) for error in errors], max_sessions=1)
        self.assertEqual(open_descriptors(), descriptors)   # though a traceback holds its session
        self.assertEqual(len(log.output), len(errors))
        for text in log.output:
            self.assertRegex(text, "(?s)Traceback.*secret")

    def test_beside_an_event_loop(self):
        async def handle(mail):
            threads.append(threading.current_thread())

        async def run():
            def deliver(mail):      # in the session's thread, which waits for the coroutine
                asyncio.run_coroutine_threadsafe(handle(mail), loop).result(PATIENCE)
            loop, server = asyncio.get_running_loop(), msmtpd.Server(deliver)
            for function in server.start, lambda: self.send_one(server), server.stop:
                await loop.run_in_executor(None, function)
        threads = []
        asyncio.run(run())
        self.assertEqual(threads, [threading.current_thread()])


class ChecksOfAddresses(LibraryCase):
    def test_are_asked_for_each_sender_and_recipient(self):
        """And know the one from the other by the mail's recipients."""
        def check(address, mail):
            asked.append((address, mail.sender, mail.recipients[-1:], mail.helo))
            if mail.recipients and address == "a@else.example":
                raise permanent("not relayed")
        asked = []
        client = self.client(self.serve(check=check))
        self.assertEqual(client.open("MAIL FROM:<a@else.example>", "RCPT TO:<a@else.example>"),
                         "553 5.1.3 not relayed")
        client.do("RCPT TO:<\"o b\"@example.org>", "RCPT TO:<root>", "DATA", ".", "MAIL FROM:<>")
        self.assertEqual(asked, [
            (address, sender, recipients, "client.example") for address, sender, recipients in (
                ("a@else.example", "a@else.example", []),
                ("a@else.example", "a@else.example", ["a@else.example"]),
                ('"o b"@example.org', "a@else.example", ['"o b"@example.org']),
                ("root", "a@else.example", ["root"]), ("", "", []))])
        self.assertEqual(self.mails[0].recipients, ['"o b"@example.org', "root"])

    def test_may_raise_the_two_failures(self):
        table = (       # what is raised, and the reply to MAIL and to RCPT
            (temporary("later"), "451 4.0.0 later", "451 4.0.0 later"),
            (temporary("Greylisted", 450), "450 4.0.0 Greylisted", "450 4.0.0 Greylisted"),
            (permanent("no"), "553 5.1.7 no", "553 5.1.3 no"),
            (permanent("no", 501), "501 5.1.7 no", "501 5.1.3 no"),
            (permanent("Mailbox full", 552), "552 5.0.0 Mailbox full", "552 5.0.0 Mailbox full"),
            (permanent("5.1.1 no", 550), "550 5.1.1 no", "550 5.1.1 no"),
            (ValueError("secret"), INTERNAL, INTERNAL))

        def check(address, mail):
            if address.startswith("bad@"):
                raise error
        self.limit(MAX_ERRORS=2)        # which these are not
        server = self.serve(check=check)
        for error, sender, recipient in table:
            with self.subTest(error=repr(error)), self.assertLogs("msmtpd", "INFO") as log:
                client = self.client(server)
                self.assertEqual(client.open("MAIL FROM:<bad@example.org>"), sender)
                self.assertEqual(client.do("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>",
                                           "RCPT TO:<bad@example.org>"), recipient)
                client.do("DATA")
                self.assertEqual(client.do("x\r\n."), "250 2.0.0 Delivered")
            self.assertEqual(self.mails.pop().recipients, ["b@example.org"])
            self.assertEqual(sum(record.levelname == "ERROR" for record in log.records),
                             2 * isinstance(error, ValueError))

    def test_may_not_be_async_nor_may_deliver(self):
        async def never(*arguments):
            raise permanent("never awaited")
        for deliver, check in (None, never), (msmtpd.Command("true"), never), (never, None):
            with warnings.catch_warnings(record=True) as warned:
                with self.assertLogs("msmtpd", "ERROR") as log:
                    client = self.client(self.serve(deliver, check=check))
                    reply = client.open("MAIL FROM:<a@example.org>", *(
                        () if check else ("RCPT TO:<b@example.org>", "DATA", "x\r\n.")))
                self.assertIn("not async ones", log.output[0])
                log = None      # which holds what was returned
            self.assertEqual((reply, warned), (INTERNAL, []))

    def test_are_asked_besides_that_of_a_command(self):
        """The command's comes first; also an object that is false, as an empty list, is a check."""
        class Asked(list):
            def __call__(self, address, mail):
                self.append(address)
                if address.startswith("bad@"):
                    raise permanent("bad")
        asked = Asked()
        client = self.client(self.serve(msmtpd.Command("cat; true"), check=asked))
        self.assertEqual(client.open("MAIL FROM:<a@b>", "RCPT TO:<bad@example.org>"),
                         "553 5.1.3 bad")
        self.assertEqual(client.do("RCPT TO:<o'b@example.org>")[:9], "553 5.1.3")
        self.assertEqual(client.do("RCPT TO:<good@example.org>")[:9], "250 2.1.5")
        self.assertEqual(asked, ["a@b", "bad@example.org", "good@example.org"])

    def test_a_refusal_and_its_details_are_lines_of_the_log(self):
        def check(address, mail):
            raise permanent("no\nsession 1: fake", details=["why\n", "else"])
        with self.assertLogs("msmtpd", "INFO") as log:
            client = self.client(self.serve(check=check))
            self.assertEqual(client.open("MAIL FROM:<a@example.org>"),
                             "553 5.1.7 no session 1: fake")
        self.assertFalse([line for line in log.output if "\n" in line])
        self.assertEqual({record.levelname for record in log.records}, {"INFO"})
        self.assertEqual([line.rpartition(": ")[2] for line in log.output
                          if line.endswith(("why\\n", "else"))], ["why\\n", "else"])


class AuthenticatingByAFunction(LibraryCase):
    def log_in(self, client, user="user", password="password"):
        """The reply to AUTH."""
        return client.do("AUTH PLAIN " + encoded("\0%s\0%s" % (user, password)))

    def test_its_answer_decides_and_what_it_raises_is_answered_by_454(self):
        self.limit(AUTH_DELAY=0)
        yes, no, failed = ("235 2.7.0 Authenticated", "250"), (
            "535 5.7.8 Wrong user name or password", "530"), (
            "454 4.7.0 Cannot authenticate now", "530")
        for answer, replies in (
                (True, yes), (False, no), (OSError("hunter2"), failed),
                (SystemExit("hunter2"), failed)):
            with self.subTest(repr(answer)), self.assertLogs("msmtpd", "DEBUG") as log:
                authenticate = mock.Mock(side_effect=[answer])
                client = self.client(self.serve(authenticate=authenticate))
                client.open()
                self.assertEqual((self.log_in(client, "us\u20acr", "hunter2"),
                                  client.do("MAIL FROM:<a@example.org>")[:3]), replies)
                self.assertEqual(authenticate.call_args[0], ("us\u20acr", "hunter2"))
            self.assertEqual(type(answer).__name__ in "".join(log.output), replies is failed)
            self.assertNotIn("hunter2", "".join(log.output))

    def test_it_need_not_be_required(self):
        self.limit(AUTH_DELAY=0)
        server = self.serve(authenticate=lambda user, password: password == "right",
                            auth_required=False)
        client = self.client(server)
        client.reply()
        client.send("EHLO client.example\r\n")
        self.assertIn("AUTH PLAIN LOGIN", [line[4:] for line in client.reply()])
        mail = "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA", "x\r\n."
        self.assertEqual(client.do(*mail), "250 2.0.0 Delivered")
        self.assertEqual(self.log_in(client, "joe", "wrong")[:3], "535")
        self.assertEqual(self.log_in(client, "joe", "right")[:3], "235")
        self.assertEqual(client.do(*mail), "250 2.0.0 Delivered")
        self.assertEqual([mail.user for mail in self.mails], [None, "joe"])

    def test_it_may_refuse_in_words_of_its_own(self):
        """By PermanentFailure as late as any refusal, and as much an error; else at once."""
        def try_error(error):
            with msmtpd.Server(print, authenticate=mock.Mock(side_effect=error)) as server, \
                    Client(server) as client:
                client.open()
                began = time.monotonic()
                reply = self.log_in(client), time.monotonic() - began >= 0.2
                self.assertEqual(client.do("MAIL FROM:<a@example.org>")[:9], "530 5.7.0")
                return reply + (client.do("FROB")[:3],)
        self.limit(AUTH_DELAY=0.2, MAX_ERRORS=2)
        table = ((temporary("No directory"), ("454 4.7.0 No directory", False, "500")),
                 (temporary("Not now", 450, "4.7.1"), ("450 4.7.1 Not now", False, "500")),
                 (permanent("Account locked"), ("535 5.7.8 Account locked", True, "421")),
                 (permanent("Not by password", 534), ("534 5.7.0 Not by password", True, "421")),
                 (permanent("5.7.9 No", 534), ("534 5.7.9 No", True, "421")))
        self.assertEqual(at_once(try_error, [error for error, _ in table]),
                         [replies for _, replies in table])


@unittest.skipUnless(ssl, "no module ssl")
class TLSByAContext(LibraryCase):
    def context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(CERTIFICATE_1 + KEY_1)
            file.flush()
            context.load_cert_chain(file.name)
        return context

    def test_is_used_as_given_by_starttls_and_from_the_first_byte(self):
        names, context = [], self.context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.sni_callback = lambda tls, name, context: names.append(name)
        for starttls in True, False:
            with self.subTest(starttls=starttls), contextlib.ExitStack() as stack:
                server = self.serve(starttls=starttls, tls=context)
                if starttls:
                    client = stack.enter_context(smtplib.SMTP(server.host, server.port, "client"))
                    client.ehlo()
                    self.assertTrue(client.has_extn("starttls"))
                    client.sendmail("a@example.org", ["b@example.org"], "plain")
                    client.starttls(context=trusting())
                else:
                    client = stack.enter_context(smtplib.SMTP_SSL(
                        server.host, server.port, "client", context=trusting()))
                client.ehlo()
                self.assertFalse(client.has_extn("starttls"))
                client.sendmail("a@example.org", ["b@example.org"], "x" * 200000)
                self.assertEqual(client.sock.version(), "TLSv1.2")
                self.assertEqual([(mail.tls, mail.size) for mail in self.mails],
                                 [(False, 6)] * starttls + [(True, 200001)])
        self.assertEqual(len(names), 2)

    def test_a_handshake_is_begun_at_once_or_not_at_all(self):
        """A client of plain SMTP, which waits for a greeting, is not kept for the timeout."""
        self.limit(HANDSHAKE_TIMEOUT=0.1, TURN=0.1)

        def ends(first):
            """Whether a client is dropped that says this, and then nothing."""
            server = self.serve(tls=self.context(), starttls=first == b"STARTTLS\r\n", timeout=60)
            began = time.monotonic()
            with Client(server) as client:
                client.send(first)
                said = client.rest()
                return said[-20:], 0.1 <= time.monotonic() - began < PATIENCE / 2
        self.assertEqual(at_once(ends, (b"", b"\x16\x03\x01\x02\x00\x01\x00", b"STARTTLS\r\n")),
                         [("", True), ("", True), ("220 2.0.0 Go ahead\r\n", True)])

    def test_its_end_is_told_also_to_one_who_talks_on(self):
        for sent, last in (b"QUIT\r\n", b"221 2.0.0"), (b"FROB\r\n" * 10, b"421 4.7.0"):
            client = self.client(self.serve(tls=self.context()))
            client.open("STARTTLS")
            context = trusting()
            context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
            with self.subTest(sent), client.socket.dup() as below, context.wrap_socket(
                    client.socket, server_hostname="localhost",
                    suppress_ragged_eofs=False) as inside:
                inside.sendall(sent)
                said = b""
                with contextlib.suppress(ssl.SSLZeroReturnError):
                    for data in iter(lambda: inside.recv(1000), b""):
                        said += data
                self.assertEqual(said.splitlines()[-1][:9], last)
                for _ in range(3 if last[:1] == b"4" else 0):
                    below.sendall(b"x")

    def test_stop_is_quick_within_it_too(self):
        self.limit(TURN=1.0)
        server = self.serve(tls=self.context())
        with smtplib.SMTP(server.host, server.port, "client", 20) as client:
            client.starttls(context=trusting())
            client.noop()       # now the server, too, has done its part of the handshake
            halfway = self.client(server)
            halfway.open("STARTTLS")            # and then nothing
            began = time.monotonic()
            server.stop()
            self.assertLess(time.monotonic() - began, 0.9)
            self.assertEqual(client.getreply()[0], 421)
            client.close()


class ErrorsOnPurpose(LibraryCase):
    def test_by_defining_a_verbs_method(self):
        class Grumpy(msmtpd.Session):
            VERBS = dict(msmtpd.Session.VERBS, XLOUD="do_XLOUD")

            def do_RCPT(self, argument):
                if "nobody@" in argument:
                    return msmtpd.Reply(550, "5.1.1", "No such user", "here")
                super().do_RCPT(argument)       # raises where it refuses
                return msmtpd.Reply(250, "2.1.5", "Taken")

            def do_NOOP(self, argument):
                return msmtpd.Reply(450, "4.2.1", argument)

            def do_XLOUD(self, argument):
                return msmtpd.Reply(250, "", argument.upper())

            def do_RSET(self, argument):
                return msmtpd.Reply(421, "4.3.2", "Lunch")

            def do_HELP(self, argument):
                raise ArithmeticError

            def do_DATA(self, argument):
                reply = super().do_DATA(argument)
                reply.enhanced, reply.lines = "", ("number %d" % self.number,)
                return reply

            do_UNKNOWN = do_NOOP        # not to be found by what a client sent

        def check(address, mail):
            if "bad@" in address:
                raise msmtpd.PermanentFailure("no", 550)
        server = self.serve(session=Grumpy, check=check)
        mail = "MAIL FROM:<a@example.org>"
        for lines, rest in (
                ([mail, "RCPT TO:<nobody@example.org>"],
                 "550-5.1.1 No such user\r\n550 5.1.1 here\r\n"),
                ([mail, "RCPT TO:<b@example.org>"], "250 2.1.5 Taken\r\n"),
                ([mail, "RCPT TO:<bad@example.org>"], "550 5.0.0 no\r\n"),
                (["NOOP spoken  loud "], "450 4.2.1 spoken  loud\r\n"),
                (["xloud abc"], "250 ABC\r\n"), (["UNKNOWN"], "500 5.5.1 Unknown command\r\n"),
                (["RSET"], "421 4.3.2 Lunch\r\n"),
                (["HELP"], "421 4.3.0 Internal error\r\n"),
                ([mail, "RCPT TO:<b@example.org>", "DATA", "x\r\n."], "250 number 9\r\n")):
            with self.subTest(lines=lines), self.assertLogs("msmtpd", "DEBUG") as log, \
                    Client(server) as client:
                client.open(*lines[:-1])
                client.send(lines[-1] + "\r\n")
                client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.rest() or "", rest)
            self.assertNotIn("abc", "".join(log.output))    # what it says may be a secret
        self.assertEqual(len(self.mails), 1)

    def test_by_another_name_and_other_extensions(self):
        class Poor(msmtpd.Session):
            hostname = "mail.example"

            def extensions(self):
                return [each for each in super().extensions() if each != "PIPELINING"] + ["XFROB 1"]
        client = self.client(self.serve(session=Poor))
        self.assertEqual(client.line(), "220 mail.example ESMTP msmtpd")
        self.assertEqual(client.do("HELO client.example"), "250 mail.example")
        client.send("EHLO client.example\r\n")
        self.assertEqual(client.reply(), [
            "250-mail.example", "250-SIZE %d" % msmtpd.MAX_SIZE, "250-8BITMIME", "250-SMTPUTF8",
            "250-ENHANCEDSTATUSCODES", "250 XFROB 1"])

    def test_by_raw_bytes_half_a_line_a_stall_and_a_line_that_is_no_verb(self):
        class Bad(msmtpd.Session):
            def greet(session):
                session.send(b"220-\xff\0\n220 ")
                session.flush()
                self.release.wait(PATIENCE)
                session.send(b"hi" * 1000 + b"\r\n")

            def do_HELP(self, argument):
                self.send(msmtpd.Reply(334, "", "What"))
                return msmtpd.Reply(250, "", repr(self.read_line()))

            def do_EXPN(self, argument):
                for number in "12":     # replies of their own, as LMTP has them: RFC 2033 4.2
                    self.send(msmtpd.Reply(250, "", number))

            def do_NOOP(self, argument):
                self.send(b"250 no end")
                self.flush()
                self.close()
        client = self.client(self.serve(session=Bad))
        self.assertEqual(client.file.read(11), b"220-\xff\0\n220 ")     # without what follows
        self.release.set()
        self.assertEqual(client.line(), "hi" * 1000)
        for raw in b" \xff raw \0\n", b"NOOP\r\n":
            self.assertEqual(client.do("HELP"), "334 What")
            client.send(raw)
            self.assertEqual(client.line(), "250 " + repr(raw))
        client.send(b"HELP\r\nquit\r\nEXPN\r\nNOOP\r\n")
        self.assertEqual(client.rest(), "334 What\r\n250 %r\r\n250 1\r\n250 2\r\n250 no end"
                         % b"quit\r\n")

    def test_by_an_end_from_outside(self):
        class Noted(msmtpd.Session):
            def greet(self):
                sessions.append(self)
                return super().greet()
        sessions = []
        server = self.serve(self.stuck, session=Noted)
        for client in self.client(server), self.in_data(server), self.sender(server):
            began = time.monotonic()
            port = client.socket.getsockname()[1]
            wait_for(lambda: [s for s in sessions if s.peer.port == port], "it")[0].close()
            self.assertIn(client.rest() or "", ("", "220 localhost ESMTP msmtpd\r\n"))
            self.assertLess(time.monotonic() - began, 1)
        self.release.set()


def parts_of(mail):
    """All that a mail is, but for its `file`."""
    return (mail.sender, mail.recipients, mail.data, mail.size, mail.peer, mail.helo, mail.user,
            mail.tls, mail.mail_options, mail.rcpt_options, mail.smtputf8, mail.outcome)


class AMail(LibraryCase):
    def test_has_an_envelope_and_data(self):
        client = self.client(self.serve())
        head = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\n\r\n"
        client.open("MAIL FROM:<> size=100  Body=8bitMIME", "RCPT TO:<b@example.org> NOTIFY=NEVER",
                    "RCPT TO:<c@example.org> orcpt=rfc822;X@y.example", "DATA")
        self.assertEqual(client.do(head + "..x\r\n\u20ac\r\n."), "250 2.0.0 Delivered")
        client.do("HELO [192.0.2.1]", "MAIL FROM:<\u00e9@example.org> SMTPUTF8", "RCPT TO:<root>",
                  "DATA", ".")
        data = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\n\n.x\n\u20ac\n".encode()
        first, second = self.mails
        peer = msmtpd.Peer("127.0.0.1", client.socket.getsockname()[1])
        self.assertEqual(parts_of(first), (
            "", ["b@example.org", "c@example.org"], data, len(data), peer, "client.example", None,
            False, ["SIZE=100", "BODY=8bitMIME"], ["NOTIFY=NEVER", "ORCPT=rfc822;X@y.example"],
            False, ""))
        for _ in range(2):
            self.assertEqual((first.data, first.file.read()), (data, data))
            self.assertIsInstance(first.message, email.message.EmailMessage)
            self.assertEqual(first.message["Subject"], "gr\u00fc\u00dfe")
        self.assertEqual((second.data, second.sender, second.smtputf8, second.helo),
                         (b"", "\u00e9@example.org", True, "[192.0.2.1]"))
        self.assertIn("b@example.org", repr(first))

    def test_can_be_made_for_the_tests_of_a_deliver(self):
        mail = msmtpd.Mail("a@example.org", ("b@example.org",), b"Subject: x\n\ny\n",
                           mail_options=("SMTPUTF8",))
        self.assertEqual((mail.recipients, mail.data, mail.size, mail.message["Subject"]),
                         (["b@example.org"], b"Subject: x\n\ny\n", 14, "x"))
        self.assertIs(mail.smtputf8, True)
        first, second = msmtpd.Mail(""), msmtpd.Mail("")
        for each in first.recipients, first.mail_options, first.rcpt_options:
            each.append("of one's own")
        self.assertEqual(parts_of(second), (
            "", [], b"", 0, msmtpd.Peer("", None), "", None, False, [], [], False, ""))

    def test_has_a_peer_of_host_and_port(self):
        peer = msmtpd.Peer("192.0.2.1", 25)
        host, port = peer
        self.assertEqual((host, port, peer.host, peer.port), ("192.0.2.1", 25) * 2)
        self.assertEqual(len({peer, msmtpd.Peer("192.0.2.1", 25), msmtpd.Peer("", None)}), 2)
        self.assertNotIn(peer, (msmtpd.Peer("192.0.2.1", 26), None))

    def test_keeps_its_data_and_lets_go_of_it_without_a_warning(self):
        descriptors = open_descriptors()
        server = self.serve()
        sizes = 10, msmtpd.MAX_MEMORY, msmtpd.MAX_MEMORY + 2, 3 * msmtpd.MAX_MEMORY
        for size in sizes:
            self.send_one(server, b"y" * (size - 1) + b"\r\n")
        server.stop()
        for mail, size in zip(self.mails, sizes):
            self.assertEqual((mail.size, len(mail.data), mail.data[-2:]), (size, size, b"y\n"))
        with warnings.catch_warnings(record=True) as caught, \
                mock.patch("sys.unraisablehook") as unraisable:
            warnings.simplefilter("always")
            for mail in self.mails:
                mail.itself = mail              # found by the collector only
            del mail, self.mails[:]
            gc.collect()
        self.assertEqual((caught, unraisable.mock_calls), ([], []))
        self.assertEqual(open_descriptors(), descriptors)

    def test_of_any_size_can_be_pickled_copied_and_put_into_a_queue(self):
        queue = multiprocessing.Queue()
        self.addCleanup(queue.join_thread)
        self.addCleanup(queue.close)
        keeping = self.serve()
        for size in 10, 3 * msmtpd.MAX_MEMORY:
            self.send_one(keeping, b"y" * size)
            mail = self.mails.pop()
            queue.put(mail)
            for way, twin in (("pickle", pickle.loads(pickle.dumps(mail))),
                              ("copy", copy.copy(mail)), ("deepcopy", copy.deepcopy(mail)),
                              ("queue", queue.get(timeout=PATIENCE))):
                with self.subTest(way, size=size):
                    self.assertEqual(parts_of(twin), parts_of(mail))
                    file = mail.file
                    file.read(5)
                    self.assertEqual(len(twin.file.read()), size + 1)
                    self.assertEqual(len(file.read()), size - 4)    # read from where it was


class WhatIsLogged(LibraryCase):
    def test_goes_to_the_logger_msmtpd_or_to_one_that_is_given(self):
        for name in ("msmtpd", "project.mail"):
            with self.subTest(name=name), self.assertLogs(name, "INFO") as log:
                server = self.serve(log=None if name == "msmtpd" else logging.getLogger(name))
                self.send_one(server, "x")
                server.stop()
            self.assertEqual({record.name for record in log.records}, {name})
            self.assertRegex("\n".join(log.output), r"session 1: mail from=<a@example\.org> "
                             r"to=<b@example\.org> size=2 status=sent seconds=[0-9.]+ "
                             r"client=\[127\.0\.0\.1\]\n")

    def test_keeps_addresses_apart(self):
        with self.assertLogs("msmtpd", "INFO") as log:
            self.client(self.serve()).open('MAIL FROM:<"a> to=<x"@b>', "RCPT TO:<c@d>", "DATA",
                                           "x\r\n.")
        self.assertIn(r'from=<"a\x3e to=<x"@b> to=<c@d> ', "".join(log.output))

    def test_tells_why_a_client_waits_that_ends_its_mail_in_bare_lf(self):
        """As some do over TLS: MIME::Lite, and what writes past the layer that ends its lines."""
        def check(leaves, data, told):
            why = "; mail data has to end in CR LF . CR LF" if told else ""
            own = logging.Logger("test")
            with self.assertLogs(own) as log:
                with msmtpd.Server(print, timeout=0.2, log=own) as server, \
                        Client(server) as client:
                    client.data()
                    client.send(data)
                    if leaves:
                        client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest(), "" if leaves else
                                     "421 4.4.2 Waited for too long%s\r\n" % why, data[-9:])
            self.assertRegex(log.output[-1], "the client %s%s$" % (
                "left" if leaves else "was silent or too slow", why), data[-9:])
        self.limit(TURN=0.03)
        at_once(lambda case: check(*case), (
            (False, "x\n.\r\n", True), (True, "x" * 99999 + "\n.\n", True),
            (True, "\n.\r\n", True), (False, "x\n..\r\n", False), (True, "x\n.\r\ny", False)))

    def test_changes_no_reply_where_it_fails(self):
        log = logging.Logger("test")
        log.addFilter(mock.Mock(side_effect=ArithmeticError))
        self.check_replies([(None, "250 2.0.0 Delivered")] * 2, log=log)

    def test_shows_a_bug_and_nothing_else_to_who_has_set_up_none(self):
        bug = r"session 1: (deliver|check) raised\nTraceback(.*\n)*ArithmeticError: why\n"
        for error, shown in ((ArithmeticError("why"), bug), (temporary("later"), ""),
                             (permanent("no", details=["because"]), "")):
            function = mock.Mock(side_effect=error, spec=())
            for deliver, check in (function, None), (print, function):
                with self.subTest(error=error, check=check), \
                        contextlib.redirect_stderr(io.StringIO()) as output, \
                        mock.patch.object(logging.root, "handlers", []):
                    with self.assertRaises(smtplib.SMTPException):
                        self.send_one(self.serve(deliver, check=check))
                    self.assertRegex(output.getvalue(), r"\A%s\Z" % shown)


# The program

def python(before="", behind=""):
    """The words that start the program as a process whose id is kept by a shell's exec.

    Other than the file itself, the module need not be compiled each time; -S saves a third of it.
    """
    return (sys.executable, "-S", "-c", "import sys; sys.path.insert(0, sys.argv[1]); %simport "
            "msmtpd; %ssys.exit(msmtpd.main(sys.argv[2:]))" % (before, behind), HERE)


def free_port():
    """A port that nobody has, nor is given meanwhile by asking for any free one."""
    while True:
        port = random.SystemRandom().randrange(10000, 32768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def status_of(pid):
    """What the kernel says of a process; as if it slept, no signal pending, where it is silent."""
    try:
        with open("/proc/%d/status" % pid, encoding="ascii") as file:
            return file.read()
    except OSError:
        return "State:\tS\nShdPnd:\t0000000000000000\n"


@contextlib.contextmanager
def handling(handler, *numbers):
    """Have signals handled so in what is started meanwhile, whatever it is for these tests."""
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before):
            signal.signal(number, old)


class HostCase(ProgramCase):
    """Tests of the program on a host that is out of the ordinary."""

    MAIL = b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"
    DIALOGUE = MAIL + b"QUIT\r\n"

    home = None     # the environment of what it starts, where it is not that of this process

    def spawn(self, *words, **popen):
        """Start a program that is ended with the test; returns its Popen."""
        popen = {"stdin": subprocess.DEVNULL, "env": self.home, **popen}
        process = subprocess.Popen(words, **popen)
        self.addCleanup(self.end, process)
        return process

    def run_words(self, *words, input=b"", **popen):
        """Run a program to its end; returns subprocess's result."""
        popen.setdefault("stderr", subprocess.PIPE)
        return subprocess.run(words, input=input, stdout=subprocess.PIPE, timeout=PATIENCE,
                              check=False, **popen)

    def in_namespace(self, script, *options):
        """The words that start a program in namespaces of its own, set up by a shell script."""
        words = ["unshare", *(options or ["--mount", "--propagation=private"]), "sh", "-ec"]
        may = "true" if options else "mount -t tmpfs none /tmp"
        if os.geteuid() or not shutil.which("unshare") or subprocess.call(
                [*words, may], stderr=subprocess.DEVNULL):
            self.skipTest("no unshare, or no right to it")
        return [*words, script + '\nexec "$@"', "sh"]

    def start_without_log(self, *arguments, **popen):
        """Start a daemon as `start` does, but without a log of its own to tell the port."""
        port = free_port()
        daemon = self.start("--port=%d" % port, *arguments, log=False, **popen)
        daemon.host, daemon.port = "127.0.0.1", port
        wait_for(lambda: can_connect(port), "the daemon")
        return daemon

    def on_terminal(self, *arguments, **options):
        """Start and stop a daemon on a terminal; return its process and what it showed."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        daemon = self.start(*arguments, stderr=slave, **options)
        os.close(slave)
        shown, stop = "", daemon.terminate
        with contextlib.suppress(OSError):      # Linux's end of input
            while select.select([master], [], [], PATIENCE)[0]:
                shown += os.read(master, 1000).decode()
                if stop and re.search("listening on .*\n", shown):
                    stop = stop()
        self.assertEqual(daemon.wait(PATIENCE), 0)
        return daemon, shown

    def check_refusal(self, *arguments, says, **options):
        """See that the program does not start, and says why in one line."""
        done = self.run_program(*arguments, **options)
        self.assertEqual((done.returncode, done.stdout), (3, b""))
        self.assertRegex(done.stderr.decode(), r"\Amsmtpd: .*\n\Z")
        self.assertRegex(done.stderr.decode(), says)


class Options(HostCase):
    """What the program says before it serves."""

    def test_version(self):
        """Here told by the file itself, to a pipe, which Python flushes at its end only."""
        environment = dict(os.environ, PYTHONUNBUFFERED="")
        done = self.run_words(sys.executable, "-S", PROGRAM, "--version", env=environment)
        self.assertEqual((done.returncode, done.stdout.decode(), done.stderr),
                         (0, "msmtpd.py %s\n" % msmtpd.__version__, b""))

    def test_help_fits_a_screen_and_agrees_with_the_manual(self):
        environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        done = self.run_words(*python(), "--log=/nonexistent/log", "--help", env=environment)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        text = done.stdout.decode()
        self.assertLessEqual(len(text.splitlines()), 50)
        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        summary = {name: " ".join(words.split()) for name, words in re.findall(
            r"(?m)^  --([\w-]+)(.*(?:\n {10}.*)*)", text)}
        try:
            with open(os.path.join(HERE, "msmtpd.1"), encoding="utf-8") as file:
                manual = file.read()
        except OSError:
            self.skipTest("no msmtpd.1")
        entries = {}
        for entry in re.search(r"(?s)\.Bl -tag.*?\n\.It (.*?)\n\.El", manual).group(1).split(
                "\n.It "):
            head, _, words = entry.partition("\n")
            words = re.sub(r"(?m)^\.(Cm|Ql|Ar|Pa) ", "", words).replace("\\ ", " ")
            for name in re.findall(r"(?:Fl|,) -([\w-]+)", head):
                entries[name] = " ".join(words.replace("\\-", "-").split())
        self.assertEqual(sorted(summary), sorted(entries))
        synopsis = re.search(r"(?s)\.Sh SYNOPSIS(.*?)\.Sh ", manual).group(1)
        self.assertEqual(sorted(re.findall(r"Fl -([\w-]+)|\| -([\w-]+)", synopsis)),
                         sorted((name, "") if name != "version" else ("", name)
                                for name in entries))
        defaults = 0
        for name, words in entries.items():
            default = re.search(r"The default is (?!not |to |the )(.*?) ?(?:[.:;](?: |$))", words)
            with self.subTest(option=name):
                self.assertEqual(re.findall(r"\((?:default:? )?([^()]+)\)", summary[name]),
                                 [default.group(1)] if default else [])
            defaults += bool(default)
        self.assertEqual(defaults, 10)

    def test_refusals(self):
        # An address that no machine has, so that what is not refused does not serve. And msmtp, if
        # it is missing, would be a warning first.
        here = "--port=0", "--command=true"
        nowhere = "--interface=192.0.2.1", *here
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = "--port=%d" % taken.getsockname()[1]
            for arguments, says in (
                    (["--port=65536"], "--port.*65535"), (["--port", "-1"], "--port"),
                    (["--port="], "--port"), (["--port"], "--port"),
                    ([port, "--command=true"], "cannot listen on 127.0.0.1 .*another --port"),
                    (["--interface="], "--interface"),
                    (["--interface=localhost", *here], "localhost. is not an IP address"),
                    ([*nowhere], "listen on 192.0.2.1 .*no such address"),
                    (["--command=", "--command=cat"], "--command"),
                    (["--command= "], "empty"), (["--command=cat;"], "ends in ;"),
                    (["--command=cat 'x"], "Unterminated|unexpected"),
                    (["--command", "msmtp", "-f", "%F"], "-f.*quotes"),
                    (["--log=", "--log=none"], "--log"), (["--auth="], "--auth"),
                    (["--log=/nonexistent/log"], "/nonexistent/log"), (["--auth=,x"], "--auth.*U"),
                    (["--auth=x,"], "--auth.*USER"), (["--auth", "-x,false"], "--auth"),
                    (["--auth=x,exit 7"], "failed, with exit status 7"),
                    (["--auth=x,true"], "no password"),
                    (["--auth=x,echo; echo secret"], "printed no password"),
                    (["--auth=joe,echo a", "--auth=ann,echo b", "--auth=joe,echo c", *nowhere],
                     "--auth.*joe"),
                    (["--max-size=x"], "--max-size.*64M"), (["--max-size=-1"], "--max-size"),
                    (["--max-sessions=0"], "--max-sessions"), (["--timeout=0"], "--timeout"),
                    (["--timeout=nan"], "--timeout"), (["--delivery-timeout=0"], "--delivery-t"),
                    (["--received=no"], "--received.*on.*off"),
                    (["--prot=25"], r"--prot\b.*--port\b"), (["--ports=25"], r"--ports.*--port\b"),
                    (["--frob"], "--frob.*--help"), (["word"], "word.*--help"),
                    (["--in"], r"--in\b.*--inetd.*--interface"), (["-p", "25"], "-p")):
                with self.subTest(arguments):
                    self.check_refusal(*arguments, says=says)

    def test_a_port_for_root(self):
        try:
            with open("/proc/sys/net/ipv4/ip_unprivileged_port_start", encoding="ascii") as file:
                first = int(file.read())
        except OSError:
            first = 1024
        words = ["setpriv", "--bounding-set=-net_bind_service"] if os.geteuid() == 0 else []
        if first <= 25 or words and (not shutil.which("setpriv") or subprocess.call(
                [*words, "true"], stderr=subprocess.DEVNULL)):
            self.skipTest("whoever runs this may listen on port 25")
        done = self.run_words(*words, *python(), "--command=true")
        self.assertEqual(done.returncode, 3)
        self.assertRegex(done.stderr.decode(), r"\Amsmtpd: cannot listen on 127.0.0.1 port 25: "
                         r"Permission denied; .*--port=2500\n\Z")

    def test_one_line_where_the_log_is_standard_error(self):
        for arguments in (["--log=-", "--port=x"], ["--log", "-", "--tls-cert-file=/nonexistent"],
                          ["--debug", "--tls-cert-file=/nonexistent"]):
            with self.subTest(arguments):
                done = self.run_program(*arguments)
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\A.* msmtpd\[\d+\] error: .*\n\Z")

    def test_under_inetd_the_client_gets_421_and_the_log_the_reason(self):
        log = "--log=" + self.log
        for arguments, says in (
                (["--inetd", log, "--prot=1", "--inted"], "--prot.*--port"),
                (["--log", self.log, "--port=x", "--inetd"], "--port"),
                (["--lo=" + self.log, "--inetd=1"], "--inetd"), ([log, "--inetd", "--t=1"], "--t"),
                ([log, "--tls-key-file=/x", "--inetd"], "--tls-cert-file"),
                (["--inetd", "--auth=x,false", log], "password command of --auth failed"),
                (["--inetd", "--frob"], None), (["--port=x", "--inetd"], None),
                (["--inetd", "--log=/nonexistent/log"], None)):
            with self.subTest(arguments), open(self.log, "w+", encoding="utf-8") as file:
                done = self.run_program(*arguments)
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stdout, rb"\A421 4\.3\.0 [^\n]*\r\n\Z")
                if says:
                    self.assertEqual(done.stderr, b"")
                    self.assertRegex(file.read(), r"\A.* error: .*%s.*\n\Z" % says)
                else:       # no log, so it is left to standard error
                    self.assertRegex(done.stderr, rb"\Amsmtpd: .*\n\Z")

    def test_a_client_that_is_standard_error_too(self):
        process = self.popen("--inetd", "--auth=joe,echo noise >&2; exit 1",
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
        self.assertRegex(process.communicate(timeout=PATIENCE)[0], rb"\A421 [^\n]*\n\Z")

    def test_both_forms_abbreviations_and_several_interfaces(self):
        hosts = ["127.0.0.1", "127.0.0.2"][:1 + (sys.platform == "linux")]
        daemon = self.start("--po", "0", "--inter", hosts[0], "--command", self.capture,
                            "--max-siz=1K", "--lo=" + self.log, "--interface=" + hosts[-1])
        self.assertIn("listening on " + " and ".join(
            "[%s]:%d" % (host, daemon.port) for host in hosts), self.logged())
        for host in hosts:
            with Client((host, daemon.port)) as client:
                client.reply()
                client.send("EHLO x\r\n")
                self.assertIn("250-SIZE 1024", client.reply())
        self.assertEqual(self.stop(daemon)[0], 0)

    def test_sizes(self):
        for text, size in (("2m", 2 << 20), ("3G", 3 << 30), ("4k", 4096), ("77", 77), ("0", 0)):
            done = self.run_program("--inetd", "--command=true", "--max-size=" + text,
                                    input=b"EHLO x\r\n")
            self.assertIn(b"250-SIZE %d\r\n" % size, done.stdout)

    def test_limits(self):
        daemon = self.start("--max-sessions=1", "--delivery-timeout=0.05", "--command=sleep 9; :",
                            limits={"FULL_TIMEOUT": 0.2, "TURN": 0.02})
        with Client(daemon) as client:
            client.data()
            self.assertEqual(client.do("x\r\n.")[:9], "451 4.3.0")
            self.assertEqual(client.rest()[:9], "421 4.4.2")    # as the only place is taken

    def test_several_users_each_with_a_password_of_its_own(self):
        daemon = self.start("--auth=ann,echo first", "--auth", "joe,echo second",
                            limits={"AUTH_DELAY": 0.0})
        for user, password, code in (("ann", "first", "235"), ("joe", "second", "235"),
                                     ("ann", "second", "535"), ("joe", "first", "535"),
                                     ("bob", "first", "535")):
            with Client(daemon) as client:
                self.assertEqual(client.open(
                    "AUTH PLAIN " + encoded("\0%s\0%s" % (user, password)))[:3], code)

    def test_warnings(self):
        for arguments, words in ((["--command=nosuchprogram %F --"], "nosuchprogram"),
                                 (["--interface=0.0.0.0"], "--auth"),
                                 (["--interface=0.0.0.0", "--auth=u,echo x"], "unencrypted")):
            with self.subTest(arguments):
                self.log = os.path.join(self.folder, words)
                status, errors = self.stop(self.start(*arguments))
                self.assertEqual(status, 0)
                self.assertRegex(errors, r"\Amsmtpd: warning: .*%s.*\n\Z" % words)
                self.assertRegex(self.logged(), "warning: .*" + words)

    @needs_ipv6
    def test_nothing_to_warn_of_on_the_loopback_of_ipv6(self):
        self.assertEqual(self.stop(self.start("--interface=::1")), (0, ""))


class Daemon(HostCase):
    """The program as a service."""

    def test_mail_goes_through(self):
        daemon = self.start("--auth=joe,echo secret", "--auth=ann,echo geheim", real=True)
        with Client(daemon) as client:
            client.open("AUTH PLAIN " + encoded("\0joe\0secret"), "MAIL FROM:<a@example.org>",
                        "RCPT TO:<b@example.org>", "RCPT TO:<c@example.org>", "DATA")
            self.assertEqual(client.do("Subject: x\r\n\r\n..\r\n."), "250 2.0.0 Delivered")
        arguments, data = self.delivered()[0]
        self.assertEqual(arguments, ["-f", "a@example.org", "--", "b@example.org",
                                     "c@example.org"])
        self.assertRegex(data.decode(), r"\AReceived: from client.example \(\[127.0.0.1\]\)\n"
                         r"\tby localhost \(msmtpd\) with ESMTPA;\n\t.*\nSubject: x\n\n\.\n\Z")
        self.assertEqual(self.stop(daemon), (0, ""))
        self.assertRegex(self.logged(), r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d msmtpd\[%d\] info: "
                         r"session 1: mail from=<a@example.org> to=<b@example.org>,<c@example.org>"
                         r" size=%d status=sent exit=0 seconds=\d+\.\d+ client=\[127.0.0.1\] "
                         r"user=joe$" % (daemon.pid, len(data)))

    def test_what_became_of_a_mail(self):
        script = self.script("fail", "#!/bin/sh\necho broken >&2; exit $(cat %s/status)\n"
                             % self.folder)
        daemon = self.start("--command=" + script, "--received=off")
        for status, reply, word in (("1", "554 5.3.0", "failed"), ("75", "451 4.3.0", "deferred")):
            with open(os.path.join(self.folder, "status"), "w", encoding="ascii") as file:
                file.write(status)
            self.assertEqual(self.send(daemon),
                             "%s Command failed (exit %s): broken" % (reply, status))
            wait_for(lambda status=status: "exit=" + status in self.logged(), "the line")
            self.assertRegex(self.logged(), r"error: session \d: broken\n.* size=16 status=%s "
                             r"exit=%s seconds=[\d.]+ client=\[127.0.0.1\]\n" % (word, status))
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_terminal(self):
        daemon, shown = self.on_terminal("--command=cat -- ")
        self.assertRegex(shown, r"\Amsmtpd: listening on \[127.0.0.1\]:%d, piping mails to: cat -- "
                         r" \(to try it: nc 127.0.0.1 %d; .*\)\s+msmtpd: stopping once .*\s+\Z"
                         % (daemon.port, daemon.port))
        _, shown = self.on_terminal("--log=-", log=False)
        self.assertEqual(shown.count("listening on"), 1)

    def test_readiness(self):
        """Told to a socket in the file system, or to Linux's abstract kind."""
        abstract = ["@" + os.path.basename(self.folder)] * (sys.platform == "linux")
        for name in (os.path.join(self.folder, "notify"), *abstract):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind(name.replace("@", "\0"))
                notify.settimeout(PATIENCE)
                daemon = self.start(env={**os.environ, "NOTIFY_SOCKET": name})
                self.assertEqual(notify.recv(100), b"READY=1")
                self.send(daemon)
                self.assertEqual(select.select([notify], [], [], 0)[0], [])
                self.stop(daemon)
                self.assertEqual(notify.recv(100), b"STOPPING=1")
            os.remove(self.log)

    # A shell puts the socket where systemd does, and keeps its process id for exec.
    INHERIT = 'exec 3<&0 </dev/null; %s exec "$@"'

    def test_inherited_sockets(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            process = self.spawn(
                "sh", "-c", self.INHERIT % "LISTEN_FDS=1 LISTEN_PID=$$ LISTEN_FDNAMES=smtp", "sh",
                *python(), "--log=" + self.log, "--command=%s; env > %s/env; :"
                % (self.capture, self.folder), stdin=listener, stderr=subprocess.PIPE)
            address = listener.getsockname()
        self.assertEqual(self.send(address)[:3], "250")
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertNotIn("LISTEN_", file.read())
        self.assertEqual(self.stop(process), (0, ""))

    def test_inherited_descriptors_that_are_no_such_sockets(self):
        def run(stdin):
            return subprocess.run(
                ["sh", "-c", self.INHERIT % "LISTEN_FDS=1 LISTEN_PID=$$", "sh", *python()],
                stdin=stdin, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
        with socket.socket() as deaf, open(os.devnull, "rb") as file:
            deaf.bind(("127.0.0.1", 0))
            for done, says in zip(at_once(run, (deaf, file)),
                                  ("is no listening socket; .*--inetd", ".+")):
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: descriptor 3 of LISTEN_FDS:? "
                                 r"%s\n\Z" % says)

    def test_sockets_that_were_for_another_process(self):
        nowhere = "--port=0", "--interface=192.0.2.1", "--command=true"
        for settings in {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_FDS": "1"}:
            self.check_refusal(*nowhere, env={**os.environ, **settings},
                               says=r"\Amsmtpd: cannot listen on 192.0.2.1 port 0: ")

    def test_the_environment_of_the_command(self):
        """Without what was meant for the program; with a PATH where inetd gives none."""
        script = self.script("show", "#!/bin/sh\n/usr/bin/env > %s/env\n" % self.folder)
        daemon = self.start("--command=" + script,
                            env={"NOTIFY_SOCKET": self.folder + "/nobody"})
        self.send(daemon)
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            environment = file.read()
        self.assertNotIn("NOTIFY_SOCKET", environment)
        self.assertIn("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
                      environment)
        self.assertEqual(self.stop(daemon), (0, ""))


class Log(HostCase):
    """Where its lines go, and what they show."""

    def test_values_are_escaped_and_cut(self):
        daemon = self.start("--command=%s -f %%F --" % self.capture)
        with Client(daemon) as client:
            client.open("MAIL FROM:<%s@b> SMTPUTF8" % ("x" * 300), "RCPT TO:<\u00fc\u0301@b>",
                        r'RCPT TO:<"a\\\"b"@c>', "RCPT TO:<a\u202eb@c>", "DATA", "x\r\n.")
        self.stop(daemon)
        self.assertIn("from=<%s> to=<\u00fc\u0301@b>,<%s> size="
                      % ("x" * 200, r'"a\\\\\\"b"@c'), self.logged())
        self.assertIn(r"RCPT TO:<a\u202eb@c>: 501", self.logged())

    def test_is_reopened(self):
        """Whether or not SIGHUP says so; where it cannot be, no reply is another."""
        folder = os.path.join(self.folder, "logs")
        os.mkdir(folder)
        self.log = os.path.join(folder, "log")
        with handling(signal.SIG_DFL, signal.SIGHUP):
            daemon = self.start(limits={"TURN": 0.1})
        shutil.rmtree(folder)
        self.assertEqual(self.send(daemon)[:3], "250")
        os.mkdir(folder)
        self.assertEqual(self.send(daemon)[:3], "250")
        wait_for(lambda: "status=sent" in self.logged(), "the new log")
        os.rename(self.log, self.log + ".1")
        daemon.send_signal(signal.SIGHUP)
        wait_for(lambda: os.path.exists(self.log), "the new log")
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_on_standard_error(self):
        for option in "--log=-", "--debug":
            daemon = self.start_without_log(option, "--command=nosuchprogram %F \udcff")
            with Client(daemon) as client:
                client.open("QUIT")
            shown = self.stop(daemon)[1]
            self.assertRegex(shown, r"info: listening on \[127.0.0.1\]:%d, piping mails to: "
                             r"nosuchprogram %%F \\udcff\n" % daemon.port)
            self.assertEqual("S: 220 localhost" in shown, option == "--debug")
            self.assertEqual(shown.count("warning: "), 1)     # the warning is told once
        daemon = self.start_without_log("--command=echo broken >&2; exit 1; :")
        self.send(daemon)
        self.assertRegex(self.stop(daemon)[1], r"\Amsmtpd: session \d: broken\n\Z")

    @contextlib.contextmanager
    def pipe(self):
        """A pipe to log to, a function that fills it, and one that empties it and returns all."""
        def fill():
            os.set_blocking(writer, False)
            while sink.write(bytes(1000)):
                pass
            os.set_blocking(writer, True)   # for the program, too

        def read():
            said.append(source.read(1 << 20) or b"")
            return b"".join(said)
        (reader, writer), said = os.pipe(), []
        os.set_blocking(reader, False)
        with open(reader, "rb", buffering=0) as source, open(writer, "wb", buffering=0) as sink:
            yield sink, fill, read

    def test_a_pipe_that_nobody_reads(self):
        """A line waits for room, once, and is dropped; sessions go on, and so does the stop."""
        with self.pipe() as (errors, fill, read):
            fill()
            daemon = self.start_without_log("--log=-", "--command=true", stderr=errors,
                                            limits={"LOG_TIMEOUT": 0.2})
            began = time.monotonic()
            with smtplib.SMTP(daemon.host, daemon.port, timeout=PATIENCE) as client:
                for _ in range(20):
                    client.sendmail("a@example.org", "b@example.org", "hi")
            self.assertLess(time.monotonic() - began, 3)    # 20 lines that wait take 4
            read()
            self.send(daemon)
            wait_for(lambda: b"status=sent" in read(), "a line, now that it is read again")
            fill()
            self.send(daemon)
            self.assertEqual(self.stop(daemon)[0], 0)

    def test_hangups_while_one_is_handled(self):
        """None is lost, and many together are few: here the first one waits for room in the log."""
        with self.pipe() as (errors, fill, read):
            with handling(signal.SIG_DFL, signal.SIGHUP):
                daemon = self.start_without_log("--log=-", stderr=errors,
                                                limits={"LOG_TIMEOUT": PATIENCE, "TURN": 0.001})
            wait_for(lambda: b"closed" in read(), "the end of the first session")
            fill()

            def waits_for_room():       # or else its turns, of a millisecond each, would show
                looks.append(status_of(daemon.pid))
                return looks[-40:] == 40 * looks[-1:] and "State:\tS" in looks[-1]
            for _ in range(4):
                looks = []
                daemon.send_signal(signal.SIGHUP)
                wait_for(waits_for_room, "the first to be handled")
            wait_for(lambda: read().count(b"SIGHUP") > 1, "those that came meanwhile")
            self.send(daemon)       # which takes several turns
            self.assertEqual(self.stop(daemon)[0], 0)
            self.assertEqual(read().count(b"SIGHUP"), 2)

    def test_standard_output_that_is_a_socket(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = self.popen("--log=/dev/stdout", "--command=true", "--port=0", stdout=theirs,
                                 stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            errors = process.communicate(timeout=PATIENCE)[1].decode()
        self.assertEqual(process.returncode, 3)
        self.assertRegex(errors, r"\Amsmtpd: cannot open the log /dev/stdout: .*--log=-.*\n\Z")

    def test_syslog(self):
        path = os.path.join(self.folder, "syslog")
        script = self.script("fail", "#!/bin/sh\necho broken >&2; echo more >&2; exit 1\n")
        words = self.in_namespace(
            "cd %s; touch null; mount --bind /dev/null null; mount -t tmpfs none /dev\n"
            "touch /dev/null; mount --bind null /dev/null; ln -s $PWD/syslog /dev/log"
            % self.folder)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
            syslog.bind(path)
            syslog.settimeout(PATIENCE)
            process = self.spawn(*words, *python(), "--inetd", "--log=syslog", "--debug",
                                 "--command=" + script, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
            process.stdin.write(self.DIALOGUE)
            process.stdin.close()
            said = []
            while not said or "status=failed" not in said[-1]:
                said.append(syslog.recv(2000).decode())
        for line in said:
            self.assertRegex(line, r"\A<%d>\w+ +\d+ [\d:]{8} msmtpd\[\d+\]: %s: \S.*\Z" % (
                (19, "error") if "broken" in line or "more" in line else (22, "info")))
        for word in "broken", "more", "C: RCPT TO:<c@d>":
            self.assertEqual(sum(line.endswith(": " + word) for line in said), 1, word)


class Shutdown(HostCase):
    """The client's view and the delivered mails always agree."""

    def setUp(self):
        super().setUp()
        self.go = os.path.join(self.folder, "go")
        self.slow = self.script("slow", (
            "#!/bin/sh\ntouch {0}.on.$$\nuntil test -e {0} || ! test -d {1}; do sleep 0.02; done\n"
            "exec {2} \"$@\"\n").format(self.go, self.folder, self.capture))

    def client_in_data(self, daemon, data):
        client = Client(daemon)
        self.addCleanup(client.close)
        client.data()
        client.send(data)
        return client

    def wait_for_commands(self, number):
        wait_for(lambda: sum(".on." in name for name in os.listdir(self.folder)) == number,
                 "the commands to run")

    def test_idle(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with handling(signal.default_int_handler, signal.SIGINT):
                daemon = self.start()
            with Client(daemon) as greeted, Client(daemon) as in_transaction:
                greeted.reply()
                in_transaction.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>")
                self.assertEqual(self.stop(daemon, number)[0], 0)
                self.assertEqual(greeted.rest()[:9], "421 4.3.2")
                self.assertEqual(in_transaction.rest()[:9], "421 4.3.2")
            self.assertFalse(can_connect(daemon.port))
            os.remove(self.log)

    def test_who_has_sent_a_mail_gets_its_reply_and_may_quit(self):
        def part(client, verb, reply):
            self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
            client.send(verb)
            self.assertRegex(client.rest(), r"\A%s .*\r\n\Z" % re.escape(reply), verb)
        daemon = self.start("--command=" + self.slow, limits={
            "PARTING_TIMEOUT": 0.15, "TURN": 0.05, "FULL_TIMEOUT": 2 * PATIENCE})
        cases = [(self.client_in_data(daemon, data), verb, reply) for data, verb, reply in (
            ("half\r\n", "QUIT\r\n", "221 2.0.0"), ("x\r\n.\r\n", "QUIT\r\n", "221 2.0.0"),
            ("x\r\n.\r\nQUIT\r\n", "", "221 2.0.0"), ("x\r\n.\r\n", "", "421 4.3.2"),
            ("x\r\n.\r\n", "MAIL FROM:<a@b>\r\n", "421 4.3.2"))]
        self.wait_for_commands(4)
        daemon.send_signal(signal.SIGTERM)
        wait_for(lambda: not can_connect(daemon.port), "the end of listening")
        os.mkdir(self.go)
        cases[0][0].send("whole\r\n.\r\n")
        at_once(lambda case: part(*case), cases)
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(len(self.delivered()), 5)
        self.assertIn(b"half\nwhole\n", [without_trace(data) for _, data in self.delivered()])

    def test_the_grace_is_for_mail_data_and_not_for_the_command(self):
        daemon = self.start("--command=" + self.slow, limits={"GRACE": 0.05, "TURN": 0.05})
        in_data = self.client_in_data(daemon, "half\r\n")
        running = self.client_in_data(daemon, "x\r\n.\r\n")
        self.wait_for_commands(1)
        daemon.send_signal(signal.SIGTERM)
        self.assertRegex(in_data.rest(), r"\A421 4\.3\.2 .*\r\n\Z")
        os.mkdir(self.go)
        self.assertEqual(running.reply(), ["250 2.0.0 Delivered"])
        running.close()
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(len(self.delivered()), 1)

    def test_a_second_signal_ends_it_and_the_command_at_once(self):
        daemon = self.start("--command=" + self.slow, stdout=subprocess.PIPE)
        client = self.client_in_data(daemon, "x\r\n.\r\n")
        self.wait_for_commands(1)
        daemon.send_signal(signal.SIGTERM)
        wait_for(lambda: not can_connect(daemon.port), "the end of listening")
        self.assertEqual(self.stop(daemon)[0], 1)   # read until the command has closed its output
        self.assertEqual(client.rest(), "")
        self.assertEqual(self.delivered(), [])

    def test_the_end_of_a_terminal_may_be_told_twice(self):
        """By the kernel and by a shell: the second is no wish to end at once."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        with handling(signal.SIG_DFL, signal.SIGHUP):
            daemon = self.start("--command=" + self.slow, stderr=slave)
        os.close(slave)
        client = self.client_in_data(daemon, "x\r\n.\r\n")
        self.wait_for_commands(1)
        daemon.send_signal(signal.SIGHUP)
        wait_for(lambda: not can_connect(daemon.port), "the end of listening")
        daemon.send_signal(signal.SIGHUP)
        wait_for(lambda: "ShdPnd:\t0000000000000000" in status_of(daemon.pid), "the signal")
        os.mkdir(self.go)
        self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
        self.assertEqual(client.do("QUIT")[:3], "221")
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(len(self.delivered()), 1)

    def test_signals_as_whoever_starts_it_may_have_left_them(self):
        with handling(signal.SIG_IGN, signal.SIGCHLD):
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            daemon = self.start()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.assertEqual(self.send(daemon), "250 2.0.0 Delivered")
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_what_was_ignored_when_it_was_started_stays_so(self):
        """SIGINT of a background job, SIGHUP under nohup; whether or not on a terminal."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        with handling(signal.SIG_IGN, signal.SIGINT, signal.SIGHUP), open(slave, "wb") as terminal:
            for errors in subprocess.PIPE, terminal:
                daemon = self.start(stderr=errors)
                daemon.send_signal(signal.SIGINT)
                daemon.send_signal(signal.SIGHUP)
                self.assertEqual(self.send(daemon), "250 2.0.0 Delivered")
                self.assertEqual(self.stop(daemon)[0], 0)
                self.assertNotIn("SIGHUP", self.logged())
                os.remove(self.log)


class Inetd(HostCase):
    """One session on standard input and output."""

    def inetd(self, *arguments, **options):
        """The program on pipes, as a process."""
        return self.popen("--inetd", "--command=%s --" % self.capture, *arguments,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def test_exit_status(self):
        silent = self.inetd("--timeout=0.1", limits={"TURN": 0.05})
        fails = "--command=cat >/dev/null; exit 75"
        once = "--command=test -e %s/on && exit 0; touch %s/on; exit 1; :" % ((self.folder,) * 2)
        for data, arguments, status in (
                (b"", (), 0), (b"EHLO x\r\n", (), 0), (b"QUIT\r\n", (), 0),
                (b"EHLO x\r\nMAIL FROM:<a@b>\r\n", (), 1), (self.MAIL, (), 0),
                (self.MAIL[:-3], (), 1), (b"GET / HTTP/1.0\r\n", (), 1),
                (self.DIALOGUE, (fails,), 1), (b"FROB\r\n" * 10, (), 1),
                (self.MAIL + self.DIALOGUE, (once,), 1)):
            with self.subTest(data[-20:], arguments=arguments):
                done = self.run_program("--inetd", "--command=true", *arguments, input=data)
                self.assertEqual(done.returncode, status)
        self.assertEqual([silent.stdout.readline()[:9] for _ in range(2)],
                         [b"220 local", b"421 4.4.2"])
        silent.stdin.close()
        self.assertEqual(silent.wait(PATIENCE), 1)

    def test_socket(self):
        """Its peer is named; what the command writes does not reach it but in the reply."""
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname(), PATIENCE) as ours:
            theirs = listener.accept()[0]
            with theirs:
                process = self.popen(
                    "--inetd", "--command=%s; echo out; echo err >&2; exit 1" % self.capture,
                    stdin=theirs, stdout=theirs, stderr=theirs)
            ours.sendall(self.DIALOGUE)
            replies = ours.makefile("rb").read()
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertTrue(replies.endswith(b"\r\n554 5.3.0 Command failed (exit 1): err\r\n"
                                         b"221 2.0.0 Goodbye\r\n"), replies)
        self.assertNotIn(b"msmtpd: session", replies)
        self.assertIn(b"from x ([127.0.0.1])\n", self.delivered()[0][1])

    def test_person_at_a_terminal(self):
        import tty
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        tty.setraw(slave)
        with open(slave, "wb") as terminal:
            process = self.popen("--inetd", "--command=" + self.capture,
                                 stdin=terminal, stdout=terminal, stderr=terminal)
        os.write(master, b"HELO me\nMAIL FROM:me\nRCPT TO:you\nDATA\nHello\n.\nQUIT\n")
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual(without_trace(self.delivered()[0][1]), b"Hello\n")

    def test_a_client_that_hears_no_replies(self):
        process = self.inetd()
        process.stdout.close()
        process.stdin.write(self.DIALOGUE)
        process.stdin.close()
        self.assertIn(process.wait(PATIENCE), (0, 1))       # and not that of SIGPIPE
        self.assertEqual(len(self.delivered()), 1)          # as it had ended its data

    def test_signal(self):
        """A socket is woken; on pipes the end of a turn is awaited."""
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        with ours, theirs, ours.makefile("rb") as replies:
            on_pipes = self.inetd(limits={"TURN": 0.05})
            on_socket = self.popen("--inetd", "--command=true", stdin=theirs, stdout=theirs,
                                   limits={"TURN": 2 * PATIENCE})
            for process, said in (on_pipes, on_pipes.stdout), (on_socket, replies):
                self.assertEqual(said.readline(), b"220 localhost ESMTP msmtpd\r\n")
                wait_for(lambda pid=process.pid: "State:\tS" in status_of(pid), "it to wait")
                process.send_signal(signal.SIGTERM)
                self.assertEqual(said.readline()[:9], b"421 4.3.2")
                self.assertEqual(process.wait(PATIENCE), 1)

    def test_a_client_that_does_not_read(self):
        process = self.inetd("--timeout=0.1", limits={"TURN": 0.05})
        os.write(process.stdin.fileno(), b"HELP\r\n" * 10000)
        self.assertEqual(process.wait(PATIENCE), 1)

    def test_a_socket_that_listens(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            process = self.popen("--inetd", "--command=true", "--timeout=0.1", "--log=" + self.log,
                                 stdin=listener, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            self.assertEqual(process.wait(PATIENCE), 3)
        self.assertRegex(self.logged(), r"\A.* error: .*\bnowait\b.*\n\Z")


class Hosts(HostCase):
    """Where something that hosts usually have is not to be had, or not as usual."""

    def test_files_beside_it_that_are_named_like_modules(self):
        """As in ~/bin; it is started by its path, from elsewhere and in isolation."""
        home = os.path.join(self.folder, "bin")
        os.mkdir(home)
        program = shutil.copy(PROGRAM, home)
        for name in ("argparse base64 collections copy ctypes email errno functools getpass "
                     "hashlib io json keyring locale logging os queue random re select shlex "
                     "shutil signal socket ssl string struct subprocess syslog tempfile textwrap "
                     "threading time traceback types typing warnings").split():
            self.script("bin/%s.py" % name, "print('mine')\nraise SystemExit('mine')\n")
        ways = [], ["-I"]

        def run(way):
            return self.run_words(
                sys.executable, *way, program, "--inetd", "--log=%s%d" % (self.log, len(way)),
                "--command=%s --" % self.capture, cwd=home, input=self.DIALOGUE)
        for way, done in zip(ways, at_once(run, ways)):
            with self.subTest(way):
                self.assertEqual((done.returncode, done.stderr), (0, b""))
                self.assertRegex(done.stdout, rb"\A220 (.*\r\n)*250 2\.0\.0 .*\r\n221 .*\r\n\Z")

    def test_a_python_that_lacks_modules(self):
        """Cut-down ones do; what needs one of them is refused, and all else works."""
        lacking = dict.fromkeys("ssl syslog pwd grp resource ctypes difflib keyring".split())
        with mock.patch.dict(sys.modules, lacking):
            for option, says in (("--prot=25", "--prot"), ("--log=syslog", "--log=FILE"),
                                 ("--tls-cert-file=x", "no ssl module")):
                self.check_refusal("--port=0", option, says=says)
        done = self.run_words(
            *python("sys.modules.update(dict.fromkeys(%r)); " % list(lacking),
                    "msmtpd.AUTH_DELAY = 0.0; "), "--inetd",
            "--auth=joe,echo secret", "--command=%s --" % self.capture,
            input=b"HELO x\r\nAUTH PLAIN %b\r\n%b" % (
                encoded("\0joe\0secret").encode(), self.MAIL))
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        (arguments, data), = self.delivered()
        self.assertEqual((arguments, data[:20]), (["--", "c@d"], b"Received: from x\n\tby"))

    def test_closed_descriptors(self):
        def run(closed):
            return self.run_words(
                "sh", "-c", 'exec "$@" ' + closed, "sh", *python(), "--inetd", "--command=true",
                "--auth=u,echo x >&2 && echo secret").returncode
        self.assertEqual(at_once(run, ("2>&-", "<&- >&- 2>&-")), [0, 0])

    def test_no_descriptor_is_free(self):
        def run(limit):
            limited = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (%d, %d)); "
            return self.run_words(*python(behind=limited % (limit, limit)), "--inetd",
                                  "--log=" + self.log, "--command=true", stderr=subprocess.STDOUT)
        for done in at_once(run, (3, 4)):
            self.assertRegex(done.stdout, rb"\A421 4\.3\.0 [^\n]*\r\n\Z")
            self.assertEqual(done.returncode, 3)

    def test_no_null_device(self):
        words = self.in_namespace("mount -t tmpfs none /dev")
        done = self.run_words(*words, *python(), "--inetd", "--log=" + self.log, "--command=true",
                              stderr=subprocess.STDOUT)
        self.assertRegex(done.stdout, rb"\A421 4\.3\.0 [^\n]*\r\n\Z")
        self.assertEqual(done.returncode, 3)
        self.assertRegex(self.logged(), r"\A.* error: .*/dev/null.*\n\Z")

    def test_no_folder_for_temporary_files(self):
        """It warns, and keeps what is larger than its memory in some without a file."""
        words = self.in_namespace(
            'for each in "$TMPDIR" /tmp /var/tmp /usr/tmp; do test -d "$each" || continue\n'
            'mount --bind "$each" "$each"; mount -o remount,bind,ro "$each"; done')
        whole = self.script("whole", "#!/bin/sh\ntest $(wc -c) -gt 1500000\n")
        with open(self.log, "wb") as log:
            process = self.spawn(*words, *python(), "--port=0", "--command=" + whole, "--log=-",
                                 stderr=log, cwd=self.folder,
                                 env={**os.environ, "TMPDIR": self.folder})
        self.assertEqual(self.send(self.address(), "x" * 1500000 + "\n"), "250 2.0.0 Delivered")
        self.assertEqual(self.stop(process)[0], 0)
        self.assertRegex(self.logged(), "warning: .*TMPDIR")

    def test_no_shell(self):
        """What a shell would have looked for is missing, and so named."""
        os.mkdir(os.path.join(self.folder, "root"))
        words = self.in_namespace(
            "root=%s/root\nfor each in /*; do name=${each#/}; test -d $each || continue\n"
            "mkdir -p $root/$name; test $name = bin || mount --rbind $each $root/$name\n"
            "done" % self.folder)
        process = self.spawn(*words, "chroot", self.folder + "/root", *python(), "--port=0",
                             "--command=nosuchprog -f %F --", "--log=" + self.log,
                             stderr=subprocess.PIPE)
        self.assertEqual(self.send(self.address())[:9], "451 4.3.5")
        status, errors = self.stop(process)
        self.assertEqual(status, 0)
        self.assertRegex(errors, r"\Amsmtpd: warning: .*nosuchprog.*\n\Z")

    def test_no_ipv6_or_no_ipv4(self):
        """The kernel's refusal to make sockets of a kind is followed by a hint."""
        words = ("strace -f -qq -o /dev/null -e trace=socket "
                 "-e inject=socket:error=EAFNOSUPPORT").split()
        if not shutil.which("strace") or subprocess.call([*words, "true"],
                                                         stderr=subprocess.DEVNULL):
            self.skipTest("no strace, or no right to it")

        def run(interface):
            return self.run_words(*words, *python(), "--port=0", "--command=true",
                                  "--interface=" + interface)
        for done, hint in zip(at_once(run, ("::", "127.0.0.1")), ("0.0.0.0", "::1")):
            self.assertEqual(done.returncode, 3)
            self.assertRegex(done.stderr.decode(),
                             r"\Amsmtpd: cannot listen on .*--interface=%s(\s.*)?\n\Z" % hint)

    def test_process_1(self):
        """Of a container: a warning of the processes that it is left with."""
        words = self.in_namespace("", "--pid", "--fork", "--kill-child=TERM")
        process = self.spawn(*words, *python(), "--port=0", "--command=true", "--log=" + self.log,
                             stderr=subprocess.PIPE)
        self.address()
        process.kill()      # of unshare, which ends it
        self.assertRegex(process.communicate(timeout=PATIENCE)[1].decode(),
                         r"\Amsmtpd: warning: .*\binit\b.*\n\Z")
        self.assertRegex(self.logged(), r"msmtpd\[1\] info: stopped\n\Z")


# Programs of others

# Made for these tests and good for nothing else: two certificates for localhost, good to the
# year 2119, each with its key, and the first key again, encrypted with the password "secret".
CERTIFICATE_1 = """\
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjExOTEyMzEyMzU5NTlaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHAR94KOYiEqwAfU
EIuZFixpnHQ8w+y1fWzrcB04ep9yYwifMG2n1iFCRUHsZR96yPG0KfkkbxkxEopo
cb5TGwqjXjBcMB0GA1UdDgQWBBSlivPCBO+jGQN3QXgNVhU0hQjA4DAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAaBgNVHREEEzARgglsb2NhbGhvc3SH
BH8AAAEwCgYIKoZIzj0EAwIDSAAwRQIhAJ5zzee5tJ2uqVvrYey6cUpJYAqFGk42
d1oanghjFyUXAiAc7wnvXFJIbnpjHvSwHftvi/5/r2DFpT4S9VSLwbe1Og==
-----END CERTIFICATE-----
"""
KEY_1 = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg9RlexVH+4xPSgrlv
1TIVxRg76m1pRy/+hI5frZsrbiahRANCAARwEfeCjmIhKsAH1BCLmRYsaZx0PMPs
tX1s63AdOHqfcmMInzBtp9YhQkVB7GUfesjxtCn5JG8ZMRKKaHG+UxsK
-----END PRIVATE KEY-----
"""
CERTIFICATE_2 = """\
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIBAjAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjExOTEyMzEyMzU5NTlaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABGXrbVOChFd/Ux9f
1r8GPYrwBLEFn31MqjhityoklGsPFjUYf87lf7tfawinPASgFRKxWjQ+8tsaL669
seGWE7WjXjBcMB0GA1UdDgQWBBQy83gFBBjO4tCH26gp+vfPY7j6QTAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAaBgNVHREEEzARgglsb2NhbGhvc3SH
BH8AAAEwCgYIKoZIzj0EAwIDRwAwRAIgCGTIgY63QjMcNNE/pUrZCmuKpWdflUHn
+WhwJ13uEMUCID9t3sW0n+Of19hMCQFz6lIprKznB74EVUy8Afic/bjH
-----END CERTIFICATE-----
"""
KEY_2 = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgl2mvTNrrclRqKXb0
xdz8oQ3SD9RndKL7xA+1/CdEMF6hRANCAARl621TgoRXf1MfX9a/Bj2K8ASxBZ99
TKo4YrcqJJRrDxY1GH/O5X+7X2sIpzwEoBUSsVo0PvLbGi+uvbHhlhO1
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiY6FGkapTMXQICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEGDCpvGDLctvcSoJ5UQlKAoEgZBw
KDisEXYsXC0mopbyDE7g5N+qN9koEq+NpedKNW/5su1gKegxFfd0MAckiBQOgMJV
woEEiku7lqJy2Yl8rzIJWDdyjVZuTDp/OYHD3pJ3iGT9Xg/DYzGmnjOqcpU4vMSc
Cu/M/wAdf5Uc+XOHHhY3hoqIYsSIk1cEWgNsXpiVo7F0CNjTpMiUzZ4ZYoUptt4=
-----END ENCRYPTED PRIVATE KEY-----
"""

TEXT = """\
.A line with a dot in front,
..and one with two.

Grüße in 8 bits, trailing blanks  \t
.
After a line that is but a dot, a long one: %s
""" % ("0123456789" * 90)
LETTER = ("""\
From: Ann <a@example.org>
To: b@example.org, c@example.org
Date: Mon, 23 Nov 2026 07:00:00 +0000
Message-ID: <1@example.org>
Subject: Greetings
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

""" + TEXT).encode()
FINGERPRINT = ":".join("%02X" % byte for byte in hashlib.sha256(
    base64.b64decode("".join(CERTIFICATE_1.split("-----")[2].split()))).digest())
ENVELOPE = ["-f", "a@example.org", "--", "b@example.org", "c@example.org"]


def trusting(certificate=CERTIFICATE_1):
    """A client's TLS context that trusts one certificate."""
    return ssl.create_default_context(cadata=certificate)


class PeerCase(HostCase):
    """Tests with programs of others: one that is missing, or a part of it, skips by its name."""

    def setUp(self):
        super().setUp()
        self.home = {"HOME": self.folder, "PATH": os.environ.get("PATH", os.defpath),
                     "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
        self.tls_files = ("--tls-cert-file=" + self.write("certificate", CERTIFICATE_1),
                          "--tls-key-file=" + self.write("key", KEY_1))

    def write(self, name, data):
        """Write a file that only its owner may read, and return its path."""
        with open(self.path(name), "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(self.path(name), 0o600)
        return self.path(name)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as file:
            return file.read()

    def need(self, *names, where=""):
        """The path of the first of these programs, skipping the test where one is missing."""
        places = os.pathsep.join((where, self.home["PATH"], "/usr/sbin:/sbin"))
        paths = [shutil.which(name, path=places) for name in names]
        for name, path in zip(names, paths):
            if not path:
                self.skipTest("no " + name)
        return paths[0]

    def need_part(self, what, pattern, *words):
        """Skip the test where the output of these words does not show a part of a program."""
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False, env=self.home)
        if not re.search(pattern, done.stdout.decode("utf-8", "replace"), re.DOTALL):
            self.skipTest("no " + what)

    def need_perl(self, *modules):
        self.need("perl")
        self.need_part("perl with " + ", ".join(modules), r"\A\Z", "perl",
                       *("-M" + module for module in modules), "-e", "1")

    def peer(self, *words, data=b"", status=0, cwd=None, **environment):
        """Run a program to its end, see that it has the right status, and return its output."""
        done = subprocess.run(words, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=PATIENCE, check=False, cwd=cwd or self.folder,
                              env={**self.home, **environment})
        output = done.stdout.decode("utf-8", "replace")
        self.assertEqual(done.returncode, status, "%s: %s" % (" ".join(words), output))
        return output

    def spawn_group(self, *words):
        """Start a program whose children are ended with it, too."""
        def end():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process = self.spawn(*words, cwd=self.folder, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(end)
        return process

    def connect(self, *address, **options):
        """A client of a server that may only be starting."""
        def connected():
            with contextlib.suppress(ConnectionRefusedError):
                return smtplib.SMTP(*address, timeout=PATIENCE, **options)
        client = wait_for(connected, "a server that listens")
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)   # as it is in Client
        self.addCleanup(client.close)
        return client

    def post(self, address):
        """Send the letter by smtplib, and see that it arrived."""
        self.post_by(self.connect(*address))

    def post_by(self, client, protocol="ESMTP", **expected):
        """The same by a client that is connected."""
        client.sendmail("a@example.org", ["b@example.org", "c@example.org"],
                        LETTER.replace(b"\n", b"\r\n"), ["BODY=8BITMIME"])
        client.quit()
        self.check_mail(self.delivered()[-1], protocol, **expected)

    def check_mail(self, mail, protocol="ESMTP", envelope=ENVELOPE, data=LETTER,
                   source="127.0.0.1"):
        """See that a mail that the command got is the one sent, behind its Received line."""
        arguments, received = mail
        self.assertEqual(arguments, envelope)
        source = r" \(\[%s\]\)" % re.escape(source) if source else ""
        self.assertRegex(received.decode("utf-8", "replace"),
                         r"\AReceived: from \S+%s\n\tby localhost \(msmtpd\) with %s;\n\t.*\n"
                         % (source, protocol))
        self.assertEqual(without_trace(received), data)

    def paper(self, name):
        """The text of README or of the manual, which may be missing where the file is vendored."""
        try:
            with open(os.path.join(HERE, name), encoding="utf-8") as file:
                return file.read()
        except OSError:
            self.skipTest("no " + name)

    def shown(self, pattern):
        """The displays of the manual in which the pattern is found, as they are to be typed."""
        text = self.paper("msmtpd.1").replace("\\e\n", "")
        for code, character in (r"\e", "\\"), (r"\-", "-"), (r"\(dq", '"'), (r"\&", ""):
            text = text.replace(code, character)
        displays = [display for display in re.findall(r"^\.Bd [^\n]*\n(.*?)^\.Ed", text,
                                                      re.DOTALL | re.MULTILINE)
                    if re.search(pattern, display, re.MULTILINE)]
        self.assertTrue(displays, "the manual shows no " + pattern)
        return displays

    def line(self, pattern):
        """What the pattern finds in them."""
        return re.search(pattern, self.shown(pattern)[0], re.MULTILINE).group()


@unittest.skipUnless(ssl, "no module ssl")
class RealClients(PeerCase):
    """The mail programs that people have, each delivering the same letter."""

    def setUp(self):
        super().setUp()
        self.ports = {}

    def port(self, way):
        """The port of a daemon that wants of its clients no more, AUTH, or TLS and AUTH."""
        if way not in self.ports:
            options = []
            if way != "plain":
                options += ["--auth=joe,echo secret", "--auth=ann,echo other"]
            if way in ("starttls", "tls"):
                options += self.tls_files
            if way == "tls":
                options.append("--tls-starttls=off")
            self.log = self.path("log-" + way)
            self.ports[way] = self.start(*options).port
        return self.ports[way]

    def check_client(self, words, *rows, compare=None, data=LETTER):
        """Run a client's command line once a row of way, protocol and further words, all at once.

        `compare` looks at the mail where it is not the very letter that arrives.
        """
        names = {"ca": self.path("certificate"),
                 "letter": self.write("letter", LETTER),
                 "unended": self.write("unended", LETTER[:-1]),     # to which some add an end
                 "fingerprint": FINGERPRINT,
                 "login": "joe:secret"}
        lines = []
        for way, _, options in rows:
            line = shlex.split(words.replace("{options}", options))
            values = {**names, "way": way, "port": self.port(way)}
            lines.append([word.format_map(values) for word in line])
        at_once(lambda line: self.peer(*line, data=data), lines)
        mails = self.delivered()
        protocols = [re.search(rb" with (\w+);", data).group(1).decode() for _, data in mails]
        self.assertEqual(sorted(protocols), sorted(protocol for _, protocol, _ in rows))
        for mail, protocol in zip(mails, protocols):
            (compare or self.check_mail)(mail, protocol)

    def check_composed(self, mail, protocol):
        """See that a mail that the client composed itself says the same as the letter."""
        message = email.message_from_bytes(without_trace(mail[1]), policy=email.policy.default)
        self.assertEqual((message["Subject"], message["From"].addresses[0].addr_spec,
                          [to.addr_spec for to in message["To"].addresses]),
                         ("Greetings", "a@example.org", ["b@example.org", "c@example.org"]))
        self.assertEqual(message.get_content().replace("\r\n", "\n"), TEXT)
        self.check_mail(mail, protocol, data=without_trace(mail[1]))

    def test_msmtp(self):
        self.need("msmtp")
        self.need_part("msmtp with TLS", r"TLS/SSL library: (?!none)", "msmtp", "--version")
        login = "--user=joe --passwordeval='echo secret'"
        trust = "--tls=on --tls-trust-file={ca}"
        self.check_client(
            "msmtp --host=127.0.0.1 --port={port} --from=a@example.org --domain=client.example "
            "{options} -- b@example.org c@example.org",
            ("plain", "ESMTP", ""),
            ("auth", "ESMTPA", "--auth=plain " + login),
            ("auth", "ESMTPA", "--auth=login --user=ann --passwordeval='echo other'"),
            ("starttls", "ESMTPSA", "--auth=on %s %s" % (login, trust)),
            ("starttls", "ESMTPSA",
             "--auth=login --tls=on --tls-fingerprint={fingerprint} " + login),
            ("tls", "ESMTPSA", "--auth=plain --tls-starttls=off %s %s" % (login, trust)))
        users = re.findall(r"status=sent.* user=(\S+)", self.read("log-auth"))
        self.assertEqual(sorted(users), ["ann", "joe"])

    def test_swaks(self):
        self.need("swaks")
        self.need_perl("Net::SSLeay", "IO::Socket::SSL")
        login = "--auth-user joe --auth-password secret"
        self.check_client(
            "swaks --server 127.0.0.1 --port {port} --from a@example.org "
            "--to b@example.org,c@example.org --ehlo client.example --suppress-data "
            "--data @{unended} {options}",
            ("plain", "SMTP", "--protocol SMTP"),
            ("starttls", "ESMTPSA", "--tls --pipeline --auth PLAIN " + login),
            ("tls", "ESMTPSA", "--tls-on-connect --auth LOGIN " + login))

    def test_curl(self):
        self.need("curl")
        self.need_part("curl with SMTP and TLS", r"\bsmtps\b", "curl", "--version")
        rows = [(way, protocol, options.replace("URL", "127.0.0.1:{port}/client.example"))
                for way, protocol, options in (
                    ("plain", "ESMTP", "smtp://URL"),
                    ("auth", "ESMTPA", "smtp://URL --user {login} --login-options AUTH=PLAIN"),
                    ("auth", "ESMTPA", "smtp://URL --user ann:other --login-options AUTH=LOGIN"),
                    ("starttls", "ESMTPSA", "smtp://URL --user {login} --ssl-reqd --cacert {ca}"),
                    ("tls", "ESMTPSA", "smtps://URL --user {login} --cacert {ca}"))]
        self.check_client("curl --silent --show-error --mail-from a@example.org --mail-rcpt "
                          "b@example.org --mail-rcpt c@example.org --crlf -T - {options}", *rows)

    def test_nodemailer(self):
        self.need("node")
        self.home["NODE_PATH"] = os.environ.get("NODE_PATH", "")
        self.need_part("nodemailer", r"\A\Z", "node", "-e", "require.resolve('nodemailer')")
        script = self.write("send.js", r"""
            const fs = require("fs"), [port, ca] = process.argv.slice(2);
            require("nodemailer").createTransport({
                host: "127.0.0.1", port: +port, name: "client.example",
                requireTLS: true, tls: {ca: fs.readFileSync(ca)},
                auth: {user: "joe", pass: "secret"},
            }).sendMail({
                envelope: {from: "a@example.org", to: ["b@example.org", "c@example.org"]},
                raw: fs.readFileSync(0),
            }).catch(error => { console.error(error); process.exit(1); });
            """)
        self.check_client("node %s {port} {ca}" % script, ("starttls", "ESMTPSA", ""))

    def test_git_send_email(self):
        self.need("git")
        if not os.path.exists(os.path.join(self.peer("git", "--exec-path").strip(),
                                           "git-send-email")):
            self.skipTest("no git send-email")
        self.need_perl("Net::SMTP 2.34", "Authen::SASL", "IO::Socket::SSL")
        login = "--smtp-user=joe --smtp-pass=secret"
        self.check_client(
            "git send-email --quiet --confirm=never --suppress-cc=all "
            "'--from=Ann <a@example.org>' --to=b@example.org --to=c@example.org "
            "--smtp-server=127.0.0.1 --smtp-server-port={port} --smtp-domain=client.example "
            "--transfer-encoding=8bit {options} {letter}",
            ("auth", "ESMTPA", "--smtp-auth=PLAIN " + login),
            ("starttls", "ESMTPSA",
             "--smtp-encryption=tls --smtp-ssl-cert-path={ca} --smtp-auth=LOGIN " + login),
            compare=self.check_composed)

    def test_mutt(self):
        self.need("mutt")
        self.need_part("mutt with SMTP, SASL and TLS",
                       r"(?=.*\+USE_SMTP)(?=.*\+USE_G?SASL)(?=.*\+USE_SSL)", "mutt", "-v")
        rc = self.write("muttrc", "set ssl_starttls=no ssl_force_tls=no smtp_pass=secret copy=no "
                        "send_charset=utf-8 hostname=client.example from=a@example.org "
                        "certificate_file=" + self.path("certificate"))
        readme = re.search("set smtp_url=.*", self.paper("README")).group().replace(
            "2500", "{port}").replace("msmtpd-user", "joe")
        self.check_client(
            "mutt -F %s {options} -s Greetings -- b@example.org c@example.org" % rc,
            ("plain", "ESMTP", "-e 'set smtp_url=smtp://127.0.0.1:{port}'"),
            ("auth", "ESMTPA", "-e '%s'" % readme),
            ("starttls", "ESMTPSA", "-e 'set smtp_url=smtp://joe@127.0.0.1:{port} "
             "ssl_starttls=yes ssl_force_tls=yes'"),
            compare=self.check_composed, data=TEXT.encode())


class Services(PeerCase):
    """Started by the programs that start services, and by the lines that README and manual show."""

    def setUp(self):
        super().setUp()
        os.symlink(sys.executable, self.path("python3"))    # which the first line names
        self.home["PATH"] = self.folder + os.pathsep + self.home["PATH"]

    def as_here(self, text):
        """A text of the manual with the paths of this machine."""
        text = re.sub(r"(?:%h|~|/usr/local)/bin/msmtpd(?:\.py)?", PROGRAM, text)
        return text.replace("/usr/bin/python3", sys.executable)

    def test_trial_of_readme(self):
        text = "\n".join(line.strip() for line in self.paper("README").splitlines()[:30])
        start, port = re.search(r"(?m)^python3 msmtpd\.py .*", text).group(), free_port()
        send = re.search(r'^python3 -c "[^"]*"$', text, re.MULTILINE).group()
        look = re.search(r"^cat [\w.]+$", text, re.MULTILINE).group()
        os.symlink(PROGRAM, self.path("msmtpd.py"))
        with handling(signal.default_int_handler, signal.SIGINT):       # not as in the background
            daemon = self.spawn("sh", "-c", "exec " + start.replace("2500", str(port)),
                                cwd=self.folder, stderr=subprocess.DEVNULL)
        self.connect("127.0.0.1", port).quit()
        self.peer("sh", "-c", send.replace("2500", str(port)))
        self.assertIn("Subject: Hello\n\nIt works.\n", self.peer("sh", "-c", look))
        self.assertEqual(self.stop(daemon, signal.SIGINT)[0], 0)

    def test_installation_and_crontab_of_readme(self):
        text = self.paper("README")
        install = re.search(r"^ +(mkdir -p ~/bin .*)", text, re.MULTILINE).group(1)
        start = re.search(r"^ +@reboot (.*)", text, re.MULTILINE).group(1)
        port = free_port()
        self.write(re.search(r"~/(\S*password\S*)'", start).group(1), "secret\n")
        self.peer("sh", "-c", install, cwd=HERE)
        self.spawn("sh", "-c", "exec " + start.replace("2500", str(port)), cwd=self.folder,
                   stderr=subprocess.DEVNULL)
        client = self.connect("127.0.0.1", port)
        self.assertEqual(client.login("msmtpd-user", "secret")[0], 235)
        client.quit()

    def test_start_stop_daemon(self):
        tool = self.need("start-stop-daemon")
        pidfile = self.path("pid")
        # What is still there after a failure must not outlive the test.
        self.addCleanup(self.peer, tool, "--stop", "--oknodo", "--pidfile", pidfile,
                        "--signal", "KILL")
        for number, form in enumerate(self.shown("^start-stop-daemon --start")):
            with self.subTest(form):
                self.log = self.path("log%d" % number)
                form = self.as_here(form)
                for old, new in (("/run/msmtpd.pid", pidfile), (" --chuid msmtpd", ""),
                                 ("--port=2500", "--port=0"), ("--log=syslog", "--log=" + self.log),
                                 ("/usr/bin/msmtp -f", self.capture + " -f"),
                                 ("start-stop-daemon", tool)):
                    form = form.replace(old, new)
                start, stop = form.strip().splitlines()
                self.peer("sh", "-c", start)
                self.post(self.address())
                self.peer(tool, "--status", "--pidfile", pidfile)
                if "--exec " + sys.executable in start:     # the form that notices what runs
                    self.assertIn("already running", self.peer("sh", "-c", start, status=1))
                self.peer("sh", "-c", stop)
                wait_for(lambda: self.logged().endswith("info: stopped\n"), "the daemon to stop")
                self.assertFalse(os.path.exists(pidfile))

    def test_inetd(self):
        inetd = self.need("inetd")
        user = pwd.getpwuid(os.getuid()).pw_name
        services, conf = [], ""
        for paper in "README", "msmtpd.1":
            line = re.search(r"^ *\S+:25 (stream tcp nowait) \S+ (\S+/msmtpd msmtpd --inetd)\b",
                             self.paper(paper), re.MULTILINE)
            options = self.tls_files if ssl and paper == "README" else ()
            services.append((free_port(), "ESMTPS" if options else "ESMTP"))
            conf += "127.0.0.1:%d %s %s %s %s\n" % (
                services[-1][0], line.group(1), user, self.as_here(line.group(2)),
                " ".join(("--command=" + self.capture, "--log=" + self.log, *options)))
        self.spawn(inetd, "-d", self.write("inetd.conf", conf), stderr=subprocess.DEVNULL)
        clients = at_once(lambda service: self.connect("127.0.0.1", service[0]), services)
        for client, (_, protocol) in zip(clients, services):
            if protocol == "ESMTPS":
                client.starttls(context=trusting())
            self.post_by(client, protocol, envelope=ENVELOPE[3:])

    def test_compiled_program_of_the_manual(self):
        library = self.path("library")
        compiled = [self.as_here(self.shown(pattern)[0]).replace("/usr/local/lib/msmtpd", library)
                    for pattern in ("-m compileall", "^#!/usr/bin/python3 ")]
        self.peer("sh", "-ec", "cd %s\n%s" % (shlex.quote(HERE), compiled[0]))
        # The same size and time, so that Python takes what was compiled: this it cannot read.
        source = os.path.join(library, "msmtpd.py")
        status = os.stat(source)
        with open(source, "w", encoding="ascii") as file:
            file.write("?" * status.st_size)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        start = self.write("start", compiled[1])
        output = self.peer(sys.executable, "-S", start, "--inetd", "--command=" + self.capture,
                           data=b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n"
                                b".\r\nQUIT\r\n")
        self.assertIn("250 2.0.0 Delivered\r\n", output)
        self.assertEqual(len(self.delivered()), 1)

    def test_systemd_units_of_the_manual(self):
        self.need("systemd-analyze")
        self.home["XDG_RUNTIME_DIR"] = self.folder
        units = {"system/msmtpd.socket": self.shown(r"^\[Socket\]")[0],
                 "system/msmtpd.service": self.shown(r"^WantedBy=multi-user\.target")[0],
                 "debian/msmtpd.service.d/override.conf": self.shown(r"^ExecStart=$")[0],
                 "debian/msmtpd.service": "[Service]\nDynamicUser=yes\nExecStart=/bin/true\n"
                 "AmbientCapabilities=CAP_NET_BIND_SERVICE\nNoNewPrivileges=yes\n",
                 "user/msmtpd.service": self.shown(r"^WantedBy=default\.target")[0]}
        for name, text in units.items():
            os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
            self.write(name, self.as_here(text))
        folders = {"system": "--system", "debian": "--system", "user": "--user"}
        said = at_once(lambda folder: self.peer("systemd-analyze", folders[folder], "verify",
                                                "./msmtpd.service", cwd=self.path(folder)), folders)
        self.assertEqual(dict(zip(folders, said)), dict.fromkeys(folders, ""))

    def test_systemd_socket(self):
        tool = self.need("systemd-socket-activate")

        def check(way):
            activate, option = way
            port = free_port()
            service = self.spawn(
                tool, "--listen=127.0.0.1:%d" % port, *activate, sys.executable, PROGRAM, option,
                "--command=%s -f %%F --" % self.capture, "--log=" + self.log,
                stderr=subprocess.DEVNULL)
            client = self.connect("127.0.0.1", port)
            client.sendmail("a@example.org", ["b@example.org"], "x\r\n")
            client.quit()
            service.terminate()
            if not activate:        # it has become the daemon
                self.assertEqual(service.wait(PATIENCE), 0)
                self.assertIn("listening on [127.0.0.1]:%d" % port, self.logged())
        at_once(check, [((), "--debug"), (("--inetd", "--accept"), "--inetd")])
        self.assertEqual(len(self.delivered()), 2)

    def test_fail2ban_filter_of_the_manual(self):
        """It finds the address of who failed, and none that somebody else made up."""
        process = self.start("--debug", "--auth=joe,echo secret", limits={"AUTH_DELAY": 0.01})
        fake = "authentication failed client=[192.0.2.1]"
        with Client(process) as client:
            client.open()
            client.do("EHLO " + fake, "AUTH PLAIN AGpvZQBzZWNyZXQ=")
            client.do('MAIL FROM:<"%s"@example.org>' % fake, fake, "MAIL FROM:<a@example.org>",
                      "RCPT TO:<b@example.org>", "RCPT TO:<-%s>" % fake)
        with Client(process) as client:
            self.assertEqual(client.open("AUTH PLAIN AGpvZQB3cm9uZw==")[:3], "535")
        wait_for(lambda: self.logged().count("closed: ") == 2, "the end of the sessions")
        pattern = self.line("^failregex = .*").split(" = ", 1)[1]
        pattern = re.compile(re.sub("<(HOST|ADDR)>", r"(?P<host>[0-9a-f.:]+)", pattern))
        # fail2ban takes the time away before it looks.
        lines = [line[19:] for line in self.logged().splitlines()]
        found = [match for match in map(pattern.search, lines) if match]
        self.assertEqual([match.group("host") for match in found], ["127.0.0.1"])
        self.assertGreater(sum(fake in line for line in lines), 3)
        if shutil.which("fail2ban-regex"):
            file = self.write("filter", self.shown("^failregex")[0])
            self.assertRegex(self.peer("fail2ban-regex", self.log, file), r"\b1 matched\b")

    def test_the_file_alone(self):
        """A copy of the file in an empty folder, without an environment, as a user without a name.

        Nothing is writable for it but what the command needs, and the place of temporary files.
        It serves, also a mail beyond its memory, and ends well and without warnings.
        """
        place = self.path("alone")
        os.mkdir(place)
        os.chmod(shutil.copy(PROGRAM, place), 0o444)
        for name, mode in ("alone", 0o555), ("", 0o755), ("mails", 0o777):
            os.chmod(self.path(name), mode)
        self.addCleanup(os.chmod, place, 0o755)
        somebody = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
        if os.getuid() or not shutil.which("setpriv") or subprocess.call(
                [*somebody, sys.executable, "-c", "import os; os.listdir()"], cwd=place,
                stderr=subprocess.DEVNULL):
            somebody = []
        with open(self.log, "wb") as log:
            process = self.spawn(
                *somebody, sys.executable, "-I", "-S", "-W", "error",
                os.path.join(place, os.path.basename(PROGRAM)), "--port=0", "--log=-",
                "--command=%s -f %%F --" % self.capture, cwd=place, env={}, stderr=log)
        address = self.address()
        self.post(address)
        with smtplib.SMTP(*address, timeout=PATIENCE) as client:
            client.sendmail("a@example.org", ["b@example.org"], b"x" * 2000000)
        self.assertEqual(len(without_trace(self.delivered()[-1][1])), 2000001)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)
        for line in self.logged().splitlines():
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\d [\d:]+ msmtpd\[\d+\] info: ")
        self.assertEqual(os.listdir(place), ["msmtpd.py"])


class Passwords(PeerCase):
    """Where --auth finds its password, and what it says where it does not."""

    def login(self, process, password, user="joe", encoding="utf-8"):
        """The reply to a login."""
        with Client(process) as client:
            return client.open("AUTH PLAIN " + encoded("\0%s\0%s" % (user, password), encoding))

    def check_password(self, password, *arguments, **popen):
        """See that the program starts with this password, whichever way a client writes it."""
        self.log = self.path("log-%d" % len(os.listdir(self.folder)))
        process = self.start(*arguments, limits={"AUTH_DELAY": 0}, start_new_session=True, **popen)
        for encoding in "utf-8", "latin-1":
            self.assertEqual(self.login(process, password, encoding=encoding)[:3], "235")
        self.assertEqual(self.login(process, password + "x")[:3], "535")
        self.assertEqual(self.stop(process)[0], 0)

    def check_no_password(self, *arguments, says, **popen):
        """See that the program does not start without a terminal to ask on, and says why."""
        self.check_refusal("--port=0", *arguments, start_new_session=True, says=says, **popen)

    def test_key_ring(self):
        self.need("dbus-run-session", "gnome-keyring-daemon", "secret-tool")
        script = self.script("session", r"""#!/bin/sh
            unlock() { printf ring | gnome-keyring-daemon --unlock --components=secrets; }
            export XDG_RUNTIME_DIR=%(folder)s/$1
            mkdir -m 700 $XDG_RUNTIME_DIR
            case $1 in
            empty)
                unlock
                %(run)s 2> said-empty
                printf secret | %(store)s ;;
            locked)
                %(run)s 2> said-locked ;;
            unlocked)
                unlock
                %(run)s --command='%(capture)s -f %%F --' --log=%(log)s ;;
            esac
            """ % {"run": "%s %s --auth=msmtpd-user --port=0" % (sys.executable, PROGRAM),
                   "folder": self.folder, "capture": self.capture, "log": self.log,
                   "store": self.line("^secret-tool store .*")})

        run = "dbus-run-session", "--", script
        self.assertEqual(self.spawn_group(*run, "empty").wait(PATIENCE), 0)
        locked, unlocked = (self.spawn_group(*run, how) for how in ("locked", "unlocked"))
        self.assertEqual(locked.wait(PATIENCE), 3)
        for name in "said-empty", "said-locked":
            self.assertRegex(self.read(name), r"\Amsmtpd: no password for msmtpd-user: "
                             r"secret-tool: .*, no terminal to ask on; store one with .*\n\Z")
        client = self.connect(*self.address())
        client.login("msmtpd-user", "secret")
        self.post_by(client, "ESMTPA")
        os.kill(int(re.search(r"msmtpd\[(\d+)\]", self.logged()).group(1)), signal.SIGTERM)
        self.assertEqual(unlocked.wait(PATIENCE), 0)

    def test_gpg(self):
        self.need("gpg", "gpgconf")
        encrypt = self.line("^gpg --encrypt .*")
        auth, = shlex.split(self.line(r"--auth=\w+-user,'gpg .*'"))
        home = tempfile.mkdtemp(prefix="gpg-", dir="/tmp")  # a short path: it becomes a socket's
        self.addCleanup(shutil.rmtree, home, ignore_errors=True)
        self.home["GNUPGHOME"] = home
        self.addCleanup(self.peer, "gpgconf", "--kill", "all")
        self.peer("gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key",
                  "me@example.org", "future-default", "default", "never")
        self.peer("sh", "-c", encrypt, data=b"secret\nand a second line\n")
        process = self.start(auth, env=self.home)
        self.assertEqual(self.login(process, "secret", "msmtpd-user")[:3], "235")
        file = shlex.split(encrypt)[-1].replace("~", self.folder)
        with open(file, "wb") as encrypted:
            encrypted.write(b"no such thing")
        self.check_no_password(auth + " 2>/dev/null", env=self.home, says="with exit status 2\n")

    def test_each_place_is_looked_at_in_its_turn(self):
        """The programs of a key ring are scripts here, and its module a file."""
        from_tool, from_module = "echo from secret-tool", "return 'from keyring'"
        asked = "('smtp://localhost', 'joe')"
        for tool, module, darwin, password, says, entry in (
                (from_tool, from_module, "", "from secret-tool", "", ""),
                ("exit 1", from_module, "exit 1", "from keyring", "", asked),
                ("exit 1", "return None", 'echo "$*"', "find-internet-password -s localhost "
                 "-r smtp -a joe -w", "", asked),
                ("echo usage; exit 2", "return None", "", "", "secret-tool: no such entry.*, "
                 "keyring: no such entry, no terminal to ask on; store one", asked),
                ("", "raise RuntimeError('No back end')", "", "", "no program secret-tool, "
                 "keyring: No back end", asked),
                ("echo some; echo reason: locked >&2; exit 1", "raise ImportError", "", "",
                 "secret-tool: locked, no Python package keyring", asked),
                ("not executable", "return ''", "", "", "secret-tool: .*Exec format", asked)):
            with self.subTest(tool=tool, module=module, darwin=darwin):
                place = self.new_folder()
                for name, text in ("secret-tool", tool), ("security", darwin):
                    if text:
                        self.script(os.path.join(place, name),
                                    "#!/bin/sh\n" * (text != "not executable") + text)
                called = os.path.join(place, "called")
                self.write(os.path.join(place, "keyring.py"),
                           "def get_password(*entry):\n    with open(%r, 'w') as file:\n"
                           "        file.write(str(entry))\n    %s\n" % (called, module))
                env = {**self.home, "PATH": place}
                with mock.patch.object(sys, "path", [place, *sys.path]), mock.patch.object(
                        sys, "platform", "darwin" if darwin else sys.platform):
                    if password:
                        self.check_password(password, "--auth=joe", env=env)
                    else:
                        self.check_no_password("--auth=joe", env=env, says=says)
                self.assertEqual(self.read(called) if os.path.exists(called) else "", entry)

    def test_the_password_is_the_first_line(self):
        self.home["PATH"] = self.folder + os.pathsep + self.home["PATH"]
        self.script("secret-tool", "#!/bin/sh\ncat printed\n")
        for way in "--auth=joe", "--auth=joe,cat printed":
            for printed, password in ((b" se cret\t \r\nmore\n", " se cret\t "),
                                      (b"p\xc3\xa4ss", "p\xe4ss"), (b"p\xe4ss\n", "p\xe4ss"),
                                      (b"\xef\xbb\xbfsecret\r\n", "secret")):
                with self.subTest(way=way, printed=printed):
                    self.write("printed", printed)
                    self.check_password(password, way, env=self.home, cwd=self.folder)
            self.write("printed", b"se\0cret\n")
            self.check_no_password(way, env=self.home, cwd=self.folder, says="NUL")

    def test_a_command_reads_standard_input_unless_that_is_a_client(self):
        self.check_no_password("--interface=192.0.2.1", "--command=true",
                           "--auth=joe,read answer && echo $answer", input=b"secret\n",
                           says="cannot listen on 192.0.2.1")       # the password was in order
        done = self.run_program("--inetd", "--command=true", "--auth=joe,cat >&2; echo secret",
                                input=b"QUIT\r\n")
        self.assertEqual((done.returncode, done.stdout.splitlines()[-1][:3]), (0, b"221"))

    def test_no_prompt_under_inetd(self):
        self.home["PATH"] = self.folder     # no secret-tool
        done = self.run_program("--auth=joe", "--inetd", "--log=" + self.log, env=self.home)
        self.assertEqual((done.returncode, done.stdout[:10]), (3, b"421 4.3.0 "))
        self.assertRegex(self.logged(), "no password for joe: .*no program secret-tool, .*"
                         "no prompt under inetd; store one with \"secret-tool store ")

    def at_terminal(self, *arguments):
        """Start the program on a terminal of its own; return its number and the terminal."""
        words = ["--port=0", "--command=%s -f %%F --" % self.capture, *arguments]
        with warnings.catch_warnings():     # of threads, none of which holds a lock here
            warnings.simplefilter("ignore", DeprecationWarning)
            number, terminal = pty.fork()
        if not number:
            status = 70
            try:
                os.closerange(3, 1024)
                os.environ["PATH"] = self.folder    # no secret-tool
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = msmtpd.main(words)
            finally:
                os._exit(status)
        self.addCleanup(os.close, terminal)
        return number, terminal

    def read_terminal(self, terminal, until=None):
        """What the terminal shows, up to a pattern or, if there is none, the end."""
        shown = b""
        with contextlib.suppress(OSError):      # Linux's end of input
            while not (until and re.search(until.encode(), shown)):
                self.assertTrue(select.select([terminal], (), (), PATIENCE)[0], (until, shown))
                shown += os.read(terminal, 1000) or self.fail(shown)
        return shown.decode("latin-1").replace("\r\n", "\n")

    def test_prompt(self):
        for typed, password in (b"secret\n", "secret"), (b"p\xe4ss\n", "p\xe4ss"):
            with self.subTest(typed=typed):
                self.log = self.path("log-" + password)
                number, terminal = self.at_terminal("--auth=joe", "--log=" + self.log)
                self.read_terminal(terminal, "Password of joe: ")
                os.write(terminal, typed)
                shown = self.read_terminal(terminal, "Ctrl-C.*\n")
                self.assertNotIn(password, shown)
                self.assertIn("listening on [127.0.0.1]:", shown)
                self.assertEqual(self.login(self.address(), password)[:3], "235")
                os.write(terminal, b"\x03")
                self.assertNotIn("Traceback", self.read_terminal(terminal))
                self.assertEqual(os.waitpid(number, 0)[1], 0)

    def test_prompt_without_an_answer(self):
        for typed in b"\n", b"\x04", b"\x03":      # Return, the end of input, and Ctrl-C
            with self.subTest(typed=typed):
                number, terminal = self.at_terminal("--auth=joe")
                self.read_terminal(terminal, "Password of joe: ")
                os.write(terminal, typed)
                if not select.select([terminal], (), (), 3)[0]:
                    os.write(terminal, typed)   # a signal right before the read does not end it
                self.assertRegex(self.read_terminal(terminal), r"\A\s*msmtpd: \S.*\n\Z")
                self.assertEqual(os.waitpid(number, 0)[1] >> 8, 3)


@unittest.skipUnless(ssl, "no module ssl")
class Encryption(PeerCase):
    """TLS, as the program serves it: see RealClients for those who use it."""

    def serve(self, *options):
        """A daemon with TLS and a login."""
        return self.start("--auth=joe,echo secret", *(options or self.tls_files),
                          limits={"TURN": 0.02})

    def inside(self, process, certificate=CERTIFICATE_1):
        """A client within TLS."""
        client = self.connect(process.host, process.port)
        client.starttls(context=trusting(certificate))
        return client

    def test_login_only_inside(self):
        process = self.serve()
        with Client(process) as client:
            client.reply()
            client.send("EHLO client.example\r\n")
            offered = client.reply()
            self.assertIn("250 STARTTLS", offered)
            self.assertNotIn("AUTH", "".join(offered))
            for line, reply in (("AUTH PLAIN AGpvZQBzZWNyZXQ=", "538 5.7.11 "),
                                ("MAIL FROM:<a@example.org>", "530 5.7.0 .*STARTTLS"),
                                ("STARTTLS now", "501 5.5.4 "), ("NOOP", "250 ")):
                self.assertRegex(client.do(line), reply)
        client = self.inside(process)
        client.ehlo("client.example")
        self.assertEqual((client.has_extn("starttls"), client.esmtp_features["auth"]),
                         (False, " PLAIN LOGIN"))
        self.assertEqual(client.docmd("STARTTLS")[0], 503)
        self.assertEqual(client.docmd("MAIL FROM:<a@example.org>")[0], 530)
        client.login("joe", "secret")
        self.post_by(client, "ESMTPSA")

    def test_session_starts_afresh_and_without_what_came_before(self):
        with Client(self.serve()) as client:
            client.open()
            client.send("STARTTLS\r\nMAIL FROM:<a@example.org>\r\nQUIT\r\n")
            self.assertEqual(client.line()[:4], "220 ")
            with trusting().wrap_socket(client.socket, server_hostname="localhost") as inside:
                login = b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n"
                inside.sendall(b"NOOP\r\nMAIL FROM:<a@example.org>\r\n" + login + b"HELO x\r\n"
                               + login + b"QUIT\r\n")
                replies = b"".join(iter(lambda: inside.recv(1000), b"")).splitlines()
        self.assertEqual([line[:9] for line in replies], [
            b"250 2.0.0", b"503 5.5.1", b"503 5.5.1", b"250 local", b"235 2.7.0", b"221 2.0.0"])

    def test_a_client_that_leaves_in_mid_data_delivers_nothing(self):
        process = self.serve()
        for way in "with TLS's farewell", "without":
            client = self.inside(process)
            client.login("joe", "secret")
            client.mail("a@example.org")
            client.rcpt("b@example.org")
            client.docmd("DATA")
            client.send(b"Subject: hi\r\n\r\nhalf a mail\r\n.\r")
            if way != "without":
                with contextlib.suppress(OSError):      # the server does not answer in kind
                    client.sock.unwrap()
            client.close()
        wait_for(lambda: self.logged().count("in mid-transaction, the client left") == 2,
                 "the sessions to end")
        self.assertEqual(self.delivered(), [])

    def test_old_versions_are_refused(self):
        # A hello of TLS 1.1, as today's clients can hardly be brought to send one.
        body = b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x04\xc0\x09\xc0\x13" + b"\x01\x00"
        hello = b"\x01" + struct.pack(">I", len(body))[1:] + body
        with Client(self.serve(*self.tls_files, "--tls-starttls=off")) as client:
            client.send(b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello)
            self.assertRegex(client.file.read(), rb"(?s)\A\x15\x03.\x00\x02\x02\x46\Z")
        wait_for(lambda: "TLS handshake failed: " in self.logged(), "a line in the log")

    @unittest.skipUnless(getattr(ssl, "HAS_TLSv1_3", False), "no TLS 1.3")
    def test_nothing_comes_unasked_behind_the_handshake(self):
        """Such as tickets, of which libesmtp takes the arrival for that of a reply."""
        client = self.inside(self.serve())
        self.assertEqual(client.sock.version(), "TLSv1.3")
        self.assertEqual(client.noop()[0], 250)     # before which they would have been read
        self.assertFalse(client.sock.session.has_ticket)

    def test_handshake_takes_a_slot_and_is_under_the_limit(self):
        def wait(way):
            with Client(processes[way]) as mute, Client(processes[way]) as waiting:
                mute.open("STARTTLS") if way == "on" else mute.send(b"\x16")
                self.assertFalse(select.select([waiting.socket], (), (), 0)[0])
                since = time.monotonic()
                self.assertEqual(mute.rest(), "")   # no words where TLS is awaited
                self.assertLess(time.monotonic() - since, 5)    # 10 would be the full rule's
                wait_for(lambda: "session 2: connect" in self.read("log-" + way), "the slot")
        processes = {}
        for way in "on", "off":     # for --tls-starttls
            self.log = self.path("log-" + way)
            processes[way] = self.serve(*self.tls_files, "--tls-starttls=" + way,
                                        "--timeout=0.2", "--max-sessions=1")
        at_once(wait, processes)

    def test_files_that_are_not_in_order(self):
        self.write("nothing", "no certificate here")
        self.write("both", CERTIFICATE_1 + KEY_1)
        self.write("other", KEY_2)
        self.write("encrypted", ENCRYPTED_KEY)
        for certificate, key, says in (
                ("missing", None, "cannot read .*missing.*No such file"),
                ("certificate", "missing", "cannot read .*missing.*No such file"),
                (".", None, "cannot read .*directory"),
                ("nothing", None, "no certificate in .*nothing, .*; if it is in another file"),
                (os.devnull, None, "cannot use the certificate in " + os.devnull),
                ("certificate", None, "no private key in .*certificate, .*--tls-key-file"),
                ("certificate", "other", "certificate in .*certificate with .*other: .*mismatch"),
                ("certificate", "nothing", "no private key in .*nothing"),
                ("certificate", "encrypted", "the key in .*encrypted is encrypted; decrypt it"),
                (None, "key", "TLS needs --tls-cert-file")):
            with self.subTest(certificate=certificate, key=key):
                options = ["--tls-%s-file=%s" % (name, self.path(value))
                           for name, value in (("cert", certificate), ("key", key)) if value]
                done = self.run_program("--port=0", *options)
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: .*%s.*\n\Z" % says)

    def test_hangup_loads_the_certificate_anew(self):
        both = self.write("both", CERTIFICATE_1 + KEY_1)
        process = self.serve("--tls-cert-file=" + both)
        before = self.inside(process)
        self.write("both", CERTIFICATE_2 + KEY_1)       # a renewal that went wrong
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "kept the certificate: " in self.logged(), "a line in the log")
        self.inside(process)
        self.assertNotIn("loaded the certificate anew", self.logged())
        self.write("both", CERTIFICATE_2 + KEY_2)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "info: loaded the certificate anew\n" in self.logged(),
                 "a line in the log")
        for each in before, self.inside(process, CERTIFICATE_2):
            each.login("joe", "secret")
            self.post_by(each, "ESMTPSA")

    def test_from_the_first_byte_under_inetd(self):
        mine, its = socket.socketpair()
        process = self.popen("--inetd", "--command=%s -f %%F --" % self.capture,
                             "--tls-starttls=off", *self.tls_files, stdin=its, stdout=its)
        its.close()
        mine.settimeout(PATIENCE)
        client = smtplib.SMTP()
        client.sock = trusting().wrap_socket(mine, server_hostname="localhost")
        self.assertEqual(client.getreply()[0], 220)
        self.post_by(client, "ESMTPS", source="")
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_certificate_of_the_manual(self):
        """Clients on the same machine accept it by name and by address."""
        self.need("openssl")
        self.peer("sh", "-c", self.shown("^openssl req")[0])
        process = self.start("--tls-cert-file=" + self.path("cert.pem"),
                             "--tls-key-file=" + self.path("key.pem"))
        for name in "127.0.0.1", "localhost":
            with self.subTest(name=name):
                client = self.connect(name, process.port)
                client.starttls(context=ssl.create_default_context(cafile=self.path("cert.pem")))
                self.post_by(client, "ESMTPS")


class Queue(PeerCase):
    """Postfix behind the program, as README shows it: it keeps what cannot be sent now."""

    def test_postfix_takes_each_mail_whole(self):
        root = os.environ.get("POSTFIX_ROOT", "/")
        programs = os.path.join(root, "usr/sbin")
        postcat = self.need("postcat", "postdrop", "sendmail", where=programs)
        if os.getuid():
            self.skipTest("no postfix without root")
        owner = next(name for name in ("postfix", "uucp", "daemon")
                     if name in {user.pw_name for user in pwd.getpwall()})
        folder = self.path("maildrop")
        os.mkdir(folder, 0o730)
        os.chown(folder, pwd.getpwnam(owner).pw_uid, -1)
        self.write("main.cf", MAIN_CF.format(folder=self.folder, programs=programs, owner=owner,
                                             libraries=os.path.join(root, "usr/lib/postfix")))
        os.utime(self.path("main.cf"), (0, 0))      # Postfix waits where it is new
        self.home["MAIL_CONFIG"] = self.folder
        self.home["LD_LIBRARY_PATH"] = os.environ.get("LD_LIBRARY_PATH", "")
        command = re.search(r"--command='(/usr/sbin/sendmail .*?)'", self.paper("README")).group(1)
        process = self.start("--command=" + command.replace("/usr/sbin", programs), env=self.home)
        client = self.connect(process.host, process.port)
        for _ in range(3):
            client.sendmail("a@example.org", ["b@example.org", "c@example.org"],
                            LETTER.replace(b"\n", b"\r\n"))
        names = os.listdir(folder)
        self.assertEqual(len(names), 3)
        for name in names:
            shown = self.peer(postcat, os.path.join(folder, name))
            self.assertEqual(re.findall("^(?:sender|recipient): (.*)", shown, re.MULTILINE),
                             ["a@example.org", "b@example.org", "c@example.org"])
            self.assertIn("\n%s*** " % LETTER.decode(), shown)


MAIN_CF = """\
queue_directory = {folder}
data_directory = {folder}
command_directory = {programs}
daemon_directory = {libraries}/sbin
shlib_directory = {libraries}
mail_owner = {owner}
setgid_group = staff
myhostname = localhost
import_environment = MAIL_CONFIG LD_LIBRARY_PATH
export_environment = MAIL_CONFIG LD_LIBRARY_PATH
maillog_file = {folder}/postfix.log
maillog_file_prefixes = /
"""


class MainJob(PeerCase):
    """Mail in by SMTP with a login, out through msmtp, to a server upstream."""

    MSMTP = ("msmtp --host=127.0.0.1 --port={port} --auth=login --user={user} "
             "--passwordeval='echo {password}' --from={sender} -- ")
    CURL = ("curl --silent --show-error --crlf --upload-file - --mail-from {sender} "
            "--user {user}:{password} smtp://127.0.0.1:{port}/client.example ")

    def upstream(self, *accounts):
        """A server that mails go on to, and msmtp's configuration with accounts for it.

        Returns the list that the mails end up in, whose users are the accounts.
        """
        mails = []
        server = msmtpd.Server(mails.append, authenticate=lambda user, password:
                               password == "secret of " + user)
        server.start()
        self.addCleanup(server.stop)
        self.write(".msmtprc", "".join(
            "account %s\nhost 127.0.0.1\nport %d\ntls off\nauth plain\nuser me-%s\n"
            'password "secret of me-%s"\n\n' % (name, server.port, name, name)
            for name in accounts))
        return mails

    def test_each_mail_arrives_once_and_unchanged(self):
        self.need("msmtp", "curl")
        mails = self.upstream("default")
        daemon = self.start("--auth=joe,echo secret", "--command=msmtp -f %F --", env=self.home)
        two = ["b@example.org", "c@example.org"]
        many = ["r%d@example.org" % number for number in range(200)]
        big = LETTER.replace(b"Content-Transfer-Encoding: 8bit\n\n", (
            b"Content-Transfer-Encoding: base64\nContent-Disposition: attachment\n\n"
            + base64.encodebytes(bytes(range(256)) * 3000)))
        self.assertGreater(len(big), 1000000)
        jobs = [(self.MSMTP, "", two, LETTER), (self.MSMTP, "", many, LETTER),
                (self.CURL, "--mail-rcpt ", two, LETTER), (self.CURL, "--mail-rcpt ", many, LETTER),
                (self.CURL, "--mail-rcpt ", two, big)]

        def send(number):
            words, option, recipients, letter = jobs[number]
            words = words.format(port=daemon.port, sender="a%d@example.org" % number, user="joe",
                                 password="secret")
            words += " ".join(option + recipient for recipient in recipients)
            self.peer(*shlex.split(words), data=letter)
        at_once(send, range(len(jobs)))
        self.assertEqual(len(mails), len(jobs))
        for mail in mails:
            _, _, recipients, letter = jobs[int(mail.sender[1:2])]
            self.assertEqual((mail.recipients, mail.user), (recipients, "me-default"))
            self.assertRegex(mail.data[:200], rb"\AReceived: from \S+ \(\[127\.0\.0\.1\]\)\n"
                             rb"\tby localhost \(msmtpd\) with ESMTPA;\n\t.*\n")
            if without_trace(mail.data) != letter:       # said short, as one is of 1 MB
                self.fail("another mail arrived from %s: %d bytes" % (mail.sender, mail.size))

    def test_users_have_accounts_of_their_own_as_the_manual_shows(self):
        self.need("msmtp", "curl")
        mails = self.upstream("joe", "ann")
        self.write("joe.pw", "secret\n")
        self.write("ann.pw", "other\n")
        words = shlex.split(self.shown("MSMTPD_USER")[0].replace("2500", "0"))[1:]
        daemon = self.start(*words, env=self.home, cwd=self.folder, limits={"AUTH_DELAY": 0.01})

        def send(words, user, password, status=0):
            words = words.format(port=daemon.port, user=user, password=password,
                                 sender=user + "@example.org")
            self.peer(*shlex.split(words), data=LETTER, status=status)
        msmtp, curl = self.MSMTP + "b@example.org", self.CURL + "--mail-rcpt b@example.org"
        at_once(lambda case: send(*case), (
            (msmtp, "joe", "secret"), (curl, "joe", "secret"), (msmtp, "ann", "other"),
            (curl, "ann", "other"), (msmtp, "joe", "other", 77)))       # EX_NOPERM
        self.assertEqual(sorted((mail.sender, mail.user) for mail in mails),
                         [("ann@example.org", "me-ann")] * 2 + [("joe@example.org", "me-joe")] * 2)
        sent = re.findall(r"from=<(\w+)@.* status=sent .* user=(\w+)\n", self.logged())
        self.assertEqual(sorted(sent), [("ann", "ann")] * 2 + [("joe", "joe")] * 2)
