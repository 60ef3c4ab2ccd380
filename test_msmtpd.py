# SPDX-License-Identifier: MIT
"""Tests of msmtpd.py, in the order of its manual and of RFC 5321: run `python3 -m unittest`.

They need nothing but Python and a POSIX system, listen on free ports of 127.0.0.1 only, and skip
by name where a program that they talk to is missing.
"""

import _thread
import asyncio
import base64
import concurrent.futures
import contextlib
import doctest
import email
import email.message
import email.policy
import errno
import fcntl
import functools
import gc
import grp
import hashlib
import importlib
import io
import itertools
import logging
import os
import platform
import pty
import pwd
import random
import re
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
import termios
import textwrap
import threading
import time
import types
import unittest
import warnings
import zipfile
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

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "msmtpd.py")
PATIENCE = 20       # seconds that a test waits for what should come at once
GLIBC = re.match(r"(\d+)\.(\d+)", dict([platform.libc_ver()]).get("glibc", ""))
HAS_POSIX_SPAWN = bool(ctypes and GLIBC) and tuple(map(int, GLIBC.groups())) >= (2, 34)


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
        time.sleep(0.002)


def session_waits(descriptors=2):
    """Whether a session waits for its client: for that and a stop, or for the client alone."""
    return any(frame.f_code.co_name == "wait" and frame.f_back.f_code.co_name == "_wait"
               and len(frame.f_locals["self"]._readers) == descriptors
               for frame in sys._current_frames().values())


@contextlib.contextmanager
def standard_error():
    """Keep what this process writes to standard error; its text is in the list at the end."""
    texts = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield texts
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        texts.append(file.read().decode())


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


class ServerCase(unittest.TestCase):
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

    def patch(self, **constants):
        """Change limits of the module for this test."""
        for name, value in constants.items():
            patcher = mock.patch.object(msmtpd, name, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def freeze(self, seconds=0):
        """Stop the server's clock for this test, after so many seconds have passed at once."""
        now = msmtpd.time.monotonic() + seconds
        self.patch(time=mock.Mock(wraps=time, monotonic=lambda: now))

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


def vars_of(mail):
    """What two runs of a dialogue have in common: all but the time."""
    return (mail.sender, mail.recipients, without_trace(mail.data), mail.helo, mail.user, mail.tls)


CAPTURE = """\
#!/bin/sh
# Keeps a mail and its arguments in files numbered in order of arrival.
cd "$(dirname "$0")/mails" || exit 75
number=1
until mkdir $number 2>/dev/null; do number=$((number + 1)); done
for argument; do printf '%s\\n' "$argument"; done > $number/arguments
cat > $number/data && mv $number/data $number/mail
"""


class ProgramCase(unittest.TestCase):
    """Tests with the program as a process, and a command that keeps the mails in files."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="msmtpd-test-")
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        os.mkdir(os.path.join(self.folder, "mails"))
        self.capture = self.script("capture", CAPTURE)
        self.log = os.path.join(self.folder, "log")

    def script(self, name, text):
        """Write an executable file and return its path."""
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, 0o755)
        return path

    def start(self, *arguments, log=True, **popen):
        """Start a daemon on a free port, wait until it listens, and return its process.

        It gets the attributes host and port. The command is self.capture unless one is given.
        """
        words = [sys.executable, PROGRAM]
        if not any(word.startswith("--command") for word in arguments):
            words.append("--command=%s -f %%F --" % self.capture)
        if not any(word.startswith("--port") for word in arguments):
            words.append("--port=0")
        if log:
            words.append("--log=" + self.log)
        popen.setdefault("stderr", subprocess.PIPE)
        process = subprocess.Popen(words + list(arguments), stdin=subprocess.DEVNULL, **popen)
        self.addCleanup(self.end, process)
        if log:
            def listening():
                if process.poll() is not None:
                    raise AssertionError("ended at once: %r" % process.communicate()[1])
                return re.search(r"listening on \[(.*?)\]:(\d+)", self.logged())
            match = wait_for(listening, "the daemon to listen")
            process.host, process.port = match.group(1), int(match.group(2))
        return process

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

    def run_program(self, *arguments, **options):
        """Run the program to its end; returns subprocess's result."""
        options.setdefault("input", b"")
        return subprocess.run([sys.executable, PROGRAM, *arguments], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=PATIENCE, check=False, **options)

    @staticmethod
    def run_here(*arguments):
        """Run the program in this process to its refusal; return its status and stderr."""
        def start(server):
            real(server)
            server.stop()
            raise AssertionError("it serves")
        real = msmtpd.Server.start
        signals = [(number, signal.getsignal(number))
                   for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        try:
            with standard_error() as errors, mock.patch.multiple(
                    msmtpd.Server, start=start, serve_descriptors=start):
                status = msmtpd.main(arguments)
        finally:
            for each in signals:
                signal.signal(*each)
        return status, errors[0]

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


def status_of(pid):
    """What the kernel says of a process; as if it slept, no signal pending, where it is silent."""
    try:
        with open("/proc/%d/status" % pid, encoding="ascii") as file:
            return file.read()
    except OSError:
        return "State:\tS\nSigPnd:\t0000000000000000"


def without_trace(data):
    """Mail data without its Received line."""
    return re.sub(rb"\AReceived: .*\n(\t.*\n)*", b"", data)


# Grammar

class Paths(unittest.TestCase):
    """RFC 5321 4.1.2, and what real clients send."""

    GOOD = (
        ("FROM:<a@example.org>", "a@example.org", ""),
        ("FROM: <a@example.org>", "a@example.org", ""),
        ("from:<a@example.org>  SIZE=1", "a@example.org", "SIZE=1"),
        ("FROM:a@example.org", "a@example.org", ""),
        ("FROM: a@example.org SIZE=1 X", "a@example.org", "SIZE=1 X"),
        ("FROM:<>", "", ""),
        ("FROM:<> AUTH=<>", "", "AUTH=<>"),
        ("FROM:root", "root", ""),
        ("FROM:<Postmaster>", "Postmaster", ""),
        ("FROM:<@a.example,@b.example:c@example.org>", "c@example.org", ""),
        ("FROM:<a@[192.0.2.1]>", "a@[192.0.2.1]", ""),
        ("FROM:<a@[IPv6:2001:db8::1]>", "a@[IPv6:2001:db8::1]", ""),
        ("FROM:<a@[x-tag:some/thing]>", "a@[x-tag:some/thing]", ""),
        ('FROM:<"a b"@example.org> SIZE=1', '"a b"@example.org', "SIZE=1"),
        (r'FROM:<"a\"> b"@example.org>', r'"a\"> b"@example.org', ""),
        ("FROM:<.a..b.@example.org>", ".a..b.@example.org", ""),
        (r'FROM:<"a\ \"\\"@c>', r'"a\ \"\\"@c', ""),
        ("FROM:<a@my_host>", "a@my_host", ""),
        ("FROM:<a@xn--bcher-kva.example>", "a@xn--bcher-kva.example", ""),
        ("FROM:<o'brien+tag@example.org>", "o'brien+tag@example.org", ""),
        ("FROM:<!#$%&'*+/=?^_`{|}~-@example.org>", "!#$%&'*+/=?^_`{|}~-@example.org", ""),
        ("FROM:<\u00fc@\u00fc.example>", "\u00fc@\u00fc.example", ""),
        ("FROM:<a%b.example@c.example>", "a%b.example@c.example", ""),
        # Joiners, which some scripts need: RFC 5892 A.1 and A.2.
        ("FROM:<a@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example>",
         "a@\u0646\u0627\u0645\u0647\u200c\u0627\u06cc.example", ""),
        ("FROM:<\u0dc1\u0dca\u200d\u0dbb\u0dd3@\u0915\u094d\u200d>",
         "\u0dc1\u0dca\u200d\u0dbb\u0dd3@\u0915\u094d\u200d", ""),
    )
    BAD = (
        "FROM:", "FROM: ", "FROM:<", "FROM:>", "FROM:<a@b", "FROM:a@b>", "FROM:<a b@c>",
        "FROM:<a@b c>", "FROM:<@example.org>", "FROM:<a@>", "FROM:<a@@b>", "FROM:<a@b@c>",
        "FROM:<a@.b>", "FROM:<a@b.>", "FROM:<a@b..c>", "FROM:<a@-b>", "FROM:<a@b->",
        "FROM:<-a@b>", "FROM:-oQ/tmp", "FROM:<@r.example:-a@b>", "FROM:<a@[1.2.3]>",
        "FROM:<a@[IPv6:xyz]>", "FROM:<a@[]>", 'FROM:<"a@b>', 'FROM:<"a"b@c>', "FROM:<a,b@c>",
        "FROM:<a@b>SIZE=1", "FROM:<a(comment)@b>", "FROM:<a\\b@c>", "FROM:<a;b@c>",
        "FROM:<a\u2028b@c>", "FROM:<a\xa0b@c>", "FROM:<a\u202eb@c>", "FROM:<<a@b>>",
        "FROM:<a\u200db@c>", "FROM:<a@\u200c>", "FROM:<a@b\u200d.c>", "FROM:<\u200c@b>",
        'FROM:<"\x7f"@c>', 'FROM:<"\\\x7f"@c>', 'FROM:<"\\"@c>',
    )

    def test_valid_paths(self):
        for argument, address, rest in self.GOOD:
            with self.subTest(argument):
                self.assertEqual(msmtpd.parse_path(argument, "FROM"), (address, rest))

    def test_invalid_paths(self):
        for argument in self.BAD:
            with self.subTest(argument):
                self.assertEqual(msmtpd.parse_path(argument, "FROM"), (None, ""))

    def test_keyword(self):
        for argument in ("", "<a@b>", "FROM <a@b>", "TO:<a@b>", "FROM :<a@b>"):
            with self.subTest(argument):
                self.assertIsNone(msmtpd.parse_path(argument, "FROM"))

    def test_long_paths_take_no_long_time(self):
        for argument in ("FROM:<" + "a" * 10000, 'FROM:<"' + "\\a" * 5000,
                         "FROM:<a@" + "a-" * 5000 + ">", "FROM:<@a," * 1500,
                         "FROM:<a@" + "a." * 5000 + ">"):
            started = time.process_time()
            self.assertEqual(msmtpd.parse_path(argument, "FROM")[0], None)
            self.assertLess(time.process_time() - started, 1)

    def test_inert(self):
        for address in ("a@example.org", "a.b_c+d/e=f:g%h,i-j@k", "\u00e9@\u00fc.example", ""):
            self.assertTrue(msmtpd.is_inert(address), address)
        for character in (" !\"#$&'()*;<>?[\\]^`{|}~\t\n\x7f\u00a0\u2028\u0301\u00d7"
                          "\u00b2\u0663\u2163"):       # digits that are no letters
            self.assertFalse(msmtpd.is_inert("a%sb@example.org" % character), repr(character))

    def test_parameters(self):
        for text, expected in (
                ("", {}), ("SIZE=1", {"SIZE": "1"}), ("size=1  BODY=8bitmime SMTPUTF8", {
                    "SIZE": "1", "BODY": "8bitmime", "SMTPUTF8": ""}),
                ("AUTH=<> ENVID=a+3Db", {"AUTH": "<>", "ENVID": "a+3Db"}),
                ("ENVID= ORCPT=rfc822;a=b@c", {"ENVID": "", "ORCPT": "rfc822;a=b@c"}),
                ("=1", None), ("-X=1", None),
                ("SIZE=1 size=2", None), ("X=\x7f", None)):
            with self.subTest(text):
                self.assertEqual(msmtpd.parse_parameters(text), expected)


class TraceFields(unittest.TestCase):
    """The Received line: RFC 5321 4.4."""

    def test_received_line(self):
        for name, peer, protocol, begin in (
                ("a.example", msmtpd.Peer("192.0.2.1", 1), "ESMTP",
                 b"Received: from a.example ([192.0.2.1])\n"
                 b"\tby localhost (msmtpd) with ESMTP;\n\t"),
                ("unknown", msmtpd.Peer("fe80::1%eth0", 1), "SMTP",
                 b"Received: from unknown ([IPv6:fe80::1])\n"
                 b"\tby localhost (msmtpd) with SMTP;\n\t"),
                ("x", msmtpd.Peer(None, None), "UTF8SMTPSA",
                 b"Received: from x\n\tby localhost (msmtpd) with UTF8SMTPSA;\n\t")):
            line = msmtpd.received_line(name, peer, protocol, 0)
            self.assertEqual(line[:len(begin)], begin)
            self.assertTrue(line.endswith(b"\n"))

    def test_date_is_rfc_5322_in_local_time(self):
        from email.utils import parsedate_to_datetime
        zone = os.environ.get("TZ")
        try:
            for name, shown in (("UTC0", "Sun, 22 Nov 2026 07:01:02 +0000"),
                                ("XXX-5:30", "Sun, 22 Nov 2026 12:31:02 +0530"),
                                ("XXX3:30", "Sun, 22 Nov 2026 03:31:02 -0330")):
                os.environ["TZ"] = name
                time.tzset()
                self.assertEqual(msmtpd.mail_date(1795330862), shown)
                self.assertEqual(parsedate_to_datetime(shown).timestamp(), 1795330862)
        finally:
            os.environ.pop("TZ")
            if zone is not None:
                os.environ["TZ"] = zone
            time.tzset()

    def test_protocols_are_registered_ones(self):
        """RFC 3848 and RFC 6531 4.3; clients say HELO even after AUTH or within TLS."""
        for greeting, smtputf8, extensions, name in (
                ("SMTP", False, "", "SMTP"), ("ESMTP", False, "", "ESMTP"),
                ("SMTP", False, "A", "ESMTPA"), ("ESMTP", False, "A", "ESMTPA"),
                ("SMTP", False, "S", "ESMTPS"), ("ESMTP", False, "S", "ESMTPS"),
                ("SMTP", False, "SA", "ESMTPSA"), ("ESMTP", False, "SA", "ESMTPSA"),
                ("SMTP", True, "", "UTF8SMTP"), ("ESMTP", True, "A", "UTF8SMTPA"),
                ("ESMTP", True, "S", "UTF8SMTPS"), ("SMTP", True, "SA", "UTF8SMTPSA")):
            with self.subTest(greeting, smtputf8=smtputf8, extensions=extensions):
                session = msmtpd.Session(None, None, None, mock.Mock())
                session._protocol, session._tls = greeting, "S" in extensions
                session.user = "joe" if "A" in extensions else None
                session.mail = msmtpd.Mail("a@b", smtputf8=smtputf8)
                self.assertIn(b" with %s;\n" % name.encode(), session._trace())

    def test_names(self):
        for argument, name in (("a.example", "a.example"), ("", "unknown"), ("a b", "invalid"),
                               ("[192.0.2.1]", "[192.0.2.1]"), ("[IPv6:::1]", "[IPv6:::1]"),
                               ("my_pc", "my_pc"), ("a(b)", "invalid"), ("\u00fc", "invalid"),
                               ("a" * 256, "invalid")):
            self.assertEqual(msmtpd.shown_name(argument), name)


class Replies(unittest.TestCase):
    """RFC 5321 4.2, RFC 2034."""

    def test_form(self):
        for reply, expected in (
                (msmtpd.Reply(250, "2.0.0", "Fine"), b"250 2.0.0 Fine\r\n"),
                (msmtpd.Reply(250, "", "a", "b"), b"250-a\r\n250 b\r\n"),
                (msmtpd.Reply(554, "5.3.0", "a", "b"), b"554-5.3.0 a\r\n554 5.3.0 b\r\n"),
                (msmtpd.Reply(334, "", ""), b"334 \r\n"),
                (msmtpd.Reply(250, "", "a-b", "c-d-e"), b"250-a-b\r\n250 c-d-e\r\n"),
                (msmtpd.Reply(451, "4.3.0", "a\r\nb\0\u00fc\t"), b"451 4.3.0 a  b?? \r\n")):
            self.assertEqual(bytes(reply), expected)

    def test_may_be_changed_until_it_is_sent(self):
        reply = msmtpd.Reply(250, "", "localhost", "PIPELINING", "SMTPUTF8")
        self.assertEqual(bytes(reply), b"250-localhost\r\n250-PIPELINING\r\n250 SMTPUTF8\r\n")
        reply.lines = [line for line in reply.lines if line != "PIPELINING"]
        self.assertEqual(bytes(reply), b"250-localhost\r\n250 SMTPUTF8\r\n")

    def test_lines_have_at_most_512_bytes(self):
        line = bytes(msmtpd.Reply(250, "2.0.0", "x" * 1000))
        self.assertEqual(len(line), 512)
        self.assertTrue(line.endswith(b"x\r\n"))


# The dialogue

class Dialogues(ServerCase):
    """Each is held whole, byte by byte, and in one piece."""

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
        self.check_dialogue("""\
            S: 220
            C: helo
            S: 250 localhost
            C: NoOp whatever you say
            S: 250 2.0.0
            C: rset now
            S: 250 2.0.0
            C: vrfy <root>
            S: 252 2.0.0
            C: help me
            S: 214 2.0.0
            C: EXPN list
            S: 502 5.5.1
            C: quit it
            S: 221 2.0.0
            """)

    def test_the_last_greeting_counts(self):
        with Client(self.serve(received=True)) as client:
            client.open("HELO a b!", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n.")
        self.assertEqual(self.mails[0].helo, "a b!")
        self.assertIn(b"from invalid ([127.0.0.1])\n\tby localhost (msmtpd) with SMTP;",
                      self.mails[0].data)

    def test_order(self):
        mails = self.check_dialogue("""\
            S: 220
            C: MAIL FROM:<a@b>
            S: 503 5.5.1
            C: EHLO x
            S: 250-
            S: 250-
            S: 250-
            S: 250-
            S: 250-
            S: 250 ENHANCEDSTATUSCODES
            C: RCPT TO:<c@d>
            S: 503 5.5.1
            C: DATA
            S: 503 5.5.1
            C: MAIL FROM:<a@b>
            S: 250
            C: MAIL FROM:<a@b>
            S: 503 5.5.1
            C: DATA
            S: 503 5.5.1
            C: RCPT TO:<c@d>
            S: 250
            C: RSET
            S: 250
            C: DATA
            S: 503 5.5.1
            C: MAIL FROM:<a@b>
            S: 250
            C: HELO again
            S: 250
            C: RCPT TO:<c@d>
            S: 503 5.5.1
            C: MAIL FROM:<a@b>
            S: 250
            C: RCPT TO:<c@d>
            S: 250
            C: DATA now
            S: 501 5.5.4
            C: DATA
            S: 354
            C: x
            C: .
            S: 250 2.0.0
            C: DATA
            S: 503 5.5.1
            C: QUIT
            S: 221
            """)
        self.assertEqual([mail.helo for mail in mails], ["again"])

    def test_syntax(self):
        self.patch(MAX_ERRORS=100)
        self.check_dialogue("""\
            S: 220
            C: HELO x
            S: 250
            C:
            S: 500 5.5.1
            C: FROB
            S: 500 5.5.1
            C: MAILFROM:<a@b>
            S: 500 5.5.1
            C: ma\\xc4\\xb1l FROM:<a@b>
            S: 500 5.5.1
            C: r\\xc5\\xbfet
            S: 500 5.5.1
            C: Content-Type: text/plain
            S: 500 5.5.1
            C: MAIL
            S: 501 5.5.2
            C: MAIL FROM
            S: 501 5.5.2
            C: MAIL TO:<a@b>
            S: 501 5.5.2
            C: MAIL FROM:<a@b
            S: 501 5.1.7
            C: MAIL FROM:<-a@b>
            S: 501 5.1.7
            C: MAIL FROM:<a@b> SIZE=
            S: 501 5.5.4
            C: MAIL FROM:<a@b> SIZE=x
            S: 501 5.5.4
            C: MAIL FROM:<a@b> BODY=BINARYMIME
            S: 501 5.5.4
            C: MAIL FROM:<a@b> SMTPUTF8=1
            S: 501 5.5.4
            C: MAIL FROM:<a@b> SIZE=1 SIZE=1
            S: 501 5.5.4
            C: MAIL FROM:<a@b> HOLDFOR=1
            S: 555 5.5.4
            C: MAIL FROM:<a@b> SIZE=67108865
            S: 552 5.3.4
            C: MAIL FROM:<a@b> SIZE=99999999999999999999
            S: 552 5.3.4
            C: MAIL FROM:<a@b> SIZE=999999999999999999999
            S: 501 5.5.4
            C: MAIL FROM:<a@b> SIZE=67108864 BODY=8bitmime AUTH=<> RET=HDRS ENVID=x
            S: 250
            C: RCPT FROM:<a@b>
            S: 501 5.5.2
            C: RCPT TO:<>
            S: 501 5.1.3
            C: RCPT TO:<a@b
            S: 501 5.1.3
            C: RCPT TO:<-a@b>
            S: 501 5.1.3
            C: RCPT TO:<a@b> SIZE=1
            S: 555 5.5.4
            C: RCPT TO:<a@b> NOTIFY=NEVER ORCPT=rfc822;a@b
            S: 250
            C: NO\\x00OP
            S: 500 5.5.2
            C: NOOP \\x1b[2J
            S: 500 5.5.2
            C: NOOP \\x7f
            S: 500 5.5.2
            C: MAIL FROM:<a\\x7f@b>
            S: 500 5.5.2
            C: NOOP a\\rQUIT
            S: 500 5.5.2
            C: NOOP \\xff
            S: 500 5.5.2
            C: STARTTLS
            S: 502 5.5.1
            C: AUTH PLAIN
            S: 502 5.5.1
            C: QUIT
            S: 221
            """)

    def test_smtputf8(self):
        mails = self.check_dialogue("""\
            S: 220
            C: HELO x
            S: 250
            C: MAIL FROM:<\\xc3\\xbc@b>
            S: 553 5.6.7
            C: MAIL FROM:<a@b>
            S: 250
            C: RCPT TO:<\\xc3\\xbc@d>
            S: 553 5.6.7
            C: RSET
            S: 250
            C: MAIL FROM:<\\xc3\\xbc@b> SMTPUTF8
            S: 250
            C: RCPT TO:<\\xc3\\xa9@d>
            S: 250
            C: DATA
            S: 354
            C: x
            C: .
            S: 250
            C: QUIT
            S: 221
            """, received=True)
        self.assertEqual((mails[0].sender, mails[0].recipients), ("\u00fc@b", ["\u00e9@d"]))
        self.assertIn(b"with UTF8SMTP;", mails[0].data)

    def test_ten_protocol_errors_end_the_session(self):
        errors = "".join("C: FROB\nS: 500 5.5.1\n" for _ in range(9))
        self.check_dialogue("S: 220\n" + errors + "C: FROB\nS: 421 4.7.0")

    def test_refused_addresses_are_no_protocol_errors(self):
        refused = "".join("C: RCPT TO:<-%d@b>\nS: 501 5.1.3\n" % n for n in range(30))
        self.check_dialogue("S: 220\nC: HELO x\nS: 250\nC: MAIL FROM:<a@b>\nS: 250\n" + refused
                            + "C: QUIT\nS: 221")

    def test_bdat_ends_the_session(self):
        self.check_dialogue("S: 220\nC: EHLO x\n" + "S: 250\n" * 6 + """\
C: MAIL FROM:<a@b>
S: 250
C: RCPT TO:<c@d>
S: 250
C: BDAT 6 LAST
S: 503 5.5.1""")

    def test_long_lines(self):
        noop, unknown = "NOOP " + "x" * 2041, "x" * 2047
        self.check_dialogue("""\
S: 220
C: %s
S: 250
C: %sx
S: 500 5.5.2
C: %s
S: 500 5.5.2
C: %s
S: 500 5.5.2
C: QUIT
S: 221""" % (noop, noop, unknown, "x" * 65534))

    def test_a_line_without_an_end(self):
        for data in (b"x" * 65537, b"x" * 65536 + b"\n", b"NOOP\r\n" + b"x" * 70000):
            with self.subTest(data[:6]), Client(self.serve()) as client:
                client.open()
                client.send(data)
                if data.startswith(b"NOOP"):
                    self.assertEqual(client.line(), "250 2.0.0 Here")
                self.assertEqual(client.line()[:9], "421 4.5.2")
                self.assertEqual(client.rest(), "")

    def test_pipelined_replies_come_together(self):
        with Client(self.serve()) as client:
            client.open()
            client.send(b"NOOP\r\n" * 100)
            wait_for(lambda: len(client.socket.recv(10000, socket.MSG_PEEK)) == 1600, "replies")

    def test_pipelined_replies_do_not_add_up_what_slow_checks_take(self):
        """The client of a thousand recipients would give up before the reply to the first."""
        now = 0.0

        def check(address, mail):
            nonlocal now
            now += 0.3 * msmtpd.GATHERING
        self.patch(time=mock.Mock(wraps=time, monotonic=lambda: now))
        sent, said = [], [b"HELO x\r\nMAIL FROM:<a@b>\r\n" + 8 * b"RCPT TO:<c@d>\r\n", b""]
        slots = msmtpd.Slots(*socket.socketpair())
        self.addCleanup(slots.close)
        wire = msmtpd.Wire(0, 0, lambda size: said.pop(0),
                           lambda data: sent.append(data.count(b"\n")) or len(data), print, slots,
                           PATIENCE)
        settings = msmtpd.Settings(print, (check,), None, True, False, 0, PATIENCE)
        msmtpd.Session(wire, settings, None, logging.getLogger("msmtpd")).run()
        self.assertEqual(sent, [1, 5, 5])

    def test_end_of_input_without_quit(self):
        server = self.serve()
        with Client(server) as client:
            client.send(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\nNOOP")
            client.socket.shutdown(socket.SHUT_WR)
            self.assertTrue(client.rest().endswith("250 2.0.0 Delivered\r\n"))
        self.assertEqual([mail.data for mail in self.mails], [b"x\n"])

    def test_a_farewell_is_heard_by_one_who_talks_on(self):
        """Its output has ended, but it is not closed: that would be a reset."""
        failure = mock.Mock(side_effect=msmtpd.TemporaryFailure("bye", 421), spec=())
        mail = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"
        server = self.serve(failure)
        self.freeze()       # so that it stays for as long as the client does
        for said in mail, "FROB\r\n" * 10, "GET /\r\n", mail * 1000:
            with self.subTest(said[:10]), Client(server) as client:
                client.open()
                client.send(said)
                self.assertEqual(client.rest().splitlines()[-1][:4], "421 ")
                for _ in range(3):
                    client.send("x")

    def test_http_is_shut_out(self):
        mail = b"\r\n\r\nEHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"
        for first in (b"POST / HTTP/1.1\r\nHost: x", b"put /x", b"Host: x", b"Content-Type: a/b",
                      *(name + b" /" for name in b"CONNECT DELETE GET HEAD OPTIONS PATCH POST PRI "
                        b"PROPFIND PUT TRACE".split()), b"FROBNICATE / HTTP/1.1",
                      b"FROBNICATE / HTTP/2", b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.0",
                      b"POST /" + b"x" * 3000 + b" HTTP/1.1", b"POST /" + b"x" * 20000,
                      b"EHLO x\r\nPOST / HTTP/1.1"):
            with self.subTest(first[:30]), Client(self.serve()) as client:
                client.send(first + mail)
                replies = client.rest().splitlines()
                self.assertEqual(replies[-1][:9], "421 4.7.0")
                self.assertEqual(self.mails, [])

    def test_tls_hello_on_a_plain_port(self):
        with self.assertLogs("msmtpd") as logs, Client(self.serve()) as client:
            client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100)))
            self.assertEqual(client.rest(), "220 localhost ESMTP msmtpd\r\n")
            wait_for(lambda: "spoke TLS" in "".join(logs.output), "the log")


class Limits(ServerCase):
    """RFC 5321 4.5.3.1, and one's own."""

    def test_are_those_of_the_manual(self):
        for line in ("MAX_SIZE 67108864", "MAX_MEMORY 1048576", "MAX_SESSIONS 16",
                     "MAX_RECIPIENTS 1000", "MAX_RECIPIENT_BYTES 262144", "MAX_LINE 2048",
                     "MAX_AUTH_LINE 12288", "MAX_ENDLESS_LINE 65536", "MAX_ERRORS 10",
                     "MAX_AUTH_FAILURES 3", "MAX_REPLY_LINE 512", "MAX_ERROR_OUTPUT 4096",
                     "MAX_ERROR_TEXT 300", "MAX_LOGGED 200", "TIMEOUT 300", "FULL_TIMEOUT 10",
                     "MIN_RATE 500", "DELIVERY_TIMEOUT 540", "KILL_DELAY 5", "AUTH_DELAY 1",
                     "AUTH_MEMORY 60", "GRACE 30"):
            name, value = line.split()
            self.assertEqual(getattr(msmtpd, name), int(value), name)

    def test_recipients(self):
        self.patch(MAX_RECIPIENTS=3)
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b>", *("RCPT TO:<r%d@d>" % n for n in range(3)))
            self.assertEqual(client.do("RCPT TO:<r3@d>")[:9], "452 4.5.3")
            self.assertEqual(client.do("DATA", "x\r\n.")[:3], "250")
        self.assertEqual(self.mails[0].recipients, ["r0@d", "r1@d", "r2@d"])

    def test_bytes_of_recipients(self):
        self.patch(MAX_RECIPIENT_BYTES=10)
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b> SMTPUTF8")
            for recipient, code in ((5 * "\u00fc" + "@d", "452"), ("1234567@d", "250"),
                                    ("c@d", "452"), ("c", "250")):
                self.assertEqual(client.do("RCPT TO:<%s>" % recipient)[:3], code)
            # That of a transaction that was given up, with some room left, does not count.
            client.do("RSET", "MAIL FROM:<a@b>", "RCPT TO:<1234567@d>")
            self.assertEqual(client.do("RSET", "MAIL FROM:<a@b>", "RCPT TO:<123456@d>")[:3], "250")

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

    def test_silent_clients(self):
        server = self.serve(timeout=0.2)
        for begin in ("", "EHLO x\r\n", "NOO"):
            with self.subTest(begin), Client(server) as client:
                client.send(begin)
                self.assertEqual(client.rest().splitlines()[-1][:9], "421 4.4.2")
        for size in 0, 200000:      # a lot of it earns nobody a longer silence
            with self.subTest("mail data", size=size), Client(server) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                client.send("x\r\n" + "x" * size)
                self.assertEqual(client.rest()[:9], "421 4.4.2")
        self.assertEqual(self.mails, [])

    def test_slow_clients(self):
        def drip(client, seconds):
            """Send a byte now and then until the server has had enough."""
            end = time.monotonic() + PATIENCE
            with contextlib.suppress(ConnectionError):
                while not select.select([client.socket], [], [], seconds)[0]:
                    client.send("x")
                    self.assertLess(time.monotonic(), end, "the server puts up with it")
        server = self.serve(timeout=0.25)
        for seconds in (0.05, 0.2 * msmtpd.MOMENT):     # with pauses, and without any
            with self.subTest("line", seconds=seconds), Client(server) as client:
                client.open()
                drip(client, seconds)
                self.assertEqual(client.rest()[:9], "421 4.4.2")
            with self.subTest("mail data", seconds=seconds), Client(server) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                drip(client, seconds)
                self.assertEqual(client.rest()[:9], "421 4.4.2")

    def test_clients_that_do_not_read(self):
        server = self.serve(timeout=0.3)
        with self.assertLogs("msmtpd") as logs, Client(server) as client:
            client.open()
            client.socket.settimeout(0.2)
            with contextlib.suppress(OSError):
                while True:
                    client.send(b"HELP\r\n" * 10000)
            wait_for(lambda: "was silent" in "".join(logs.output), "the end of the session")


# Mail data

class MailData(ServerCase):
    """RFC 5321 4.5.2 and 4.1.1.4."""

    TABLE = (       # as sent, without the end of the data; as handed over
        (b"", b""), (b"\r\n", b"\n"), (b"x\r\n", b"x\n"),
        (b"..\r\n", b".\n"), (b".x\r\n", b"x\n"), (b"x.\r\n..y\r\n", b"x.\n.y\n"),
        (b"a\nb\r\n", b"a\nb\n"), (b"a\n..b\r\n", b"a\n.b\n"), (b"a\n.\nb\r\n", b"a\n\nb\n"),
        (b"a\rb\r\n", b"a b\n"), (b"a\r\r\n", b"a \n"), (b"a\r.\rb\r\n", b"a . b\n"),
        (b"a\n.\r\nb\r\n", b"a\n\nb\n"), (b"a\r\n.\nb\r\n", b"a\n\nb\n"),
        (b"a\r\n.\rb\r\n", b"a\n b\n"), (b"\0\xff\r\n", b"\0\xff\n"),
        (b"a\r\n\0.\r\nb\r\n", b"a\n\0.\nb\n"), (b"a\r\n. \r\nb\r\n", b"a\n \nb\n"),
        (b"a\r\n.\0\r\nb\r\n", b"a\n\0\nb\n"), (b"a\r\r\n.\r\r\nb\r\n", b"a \n \nb\n"),
        (b"a\r\n...\r\n", b"a\n..\n"), (b"a\n\r\n", b"a\n\n"),
    )

    def send(self, client, data):
        client.do("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
        client.send(data)
        return client.reply()

    def test_table(self):
        with Client(self.serve()) as client:
            client.open()
            for sent, expected in self.TABLE:
                with self.subTest(sent):
                    self.assertEqual(self.send(client, sent + b".\r\n"), ["250 2.0.0 Delivered"])
                    self.assertEqual(self.mails[-1].data, expected)
                    self.assertEqual(self.mails[-1].size, len(expected))
        self.assertEqual(len(self.mails), len(self.TABLE))

    def test_transparency_in_any_pieces(self):
        for sent, expected in self.TABLE:
            for cuts in itertools.combinations(range(len(sent)), 2):
                ends = (*cuts, len(sent))
                transparency = msmtpd.Transparency()
                pieces = (sent[a:b] for a, b in zip((0, *ends), ends))
                self.assertEqual(b"".join(map(transparency.decode, pieces)), expected)

    def test_every_cut_of_the_end(self):
        sent = b"..a\r\n.b\r\n..\r\n\n.\n\r\n.\r\nNOOP\r\n"
        server = self.serve()
        for cut in range(len(sent)):
            with Client(server) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                client.send(sent[:cut])
                client.send(sent[cut:])
                self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
                self.assertEqual(client.reply(), ["250 2.0.0 Here"])
                self.assertEqual(self.mails[-1].data, b".a\nb\n.\n\n\n\n")

    def test_bare_lf_ends_the_data_only_where_every_line_ended_so(self):
        lines = ["EHLO x", "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"]
        for number in range(-1, len(lines)):
            with self.subTest(number), Client(self.serve()) as client:
                client.send("".join(line + ("\r\n" if n == number else "\n")
                                    for n, line in enumerate(lines)))
                client.send("one\n.\nNOOP\ntwo\r\n.\r\nQUIT\n")
                client.rest()
                self.assertEqual([mail.data for mail in self.mails],
                                 [b"one\n" if number < 0 else b"one\n\nNOOP\ntwo\n"])

    def test_the_line_of_data_is_no_end_but_by_its_own(self):
        with Client(self.serve()) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>")
            client.send("DATA\n.\r\nNOOP\r\n.\r\n")
            self.assertEqual(client.line()[:3], "354")
            self.assertEqual(client.line(), "250 2.0.0 Delivered")
            self.assertEqual([mail.data for mail in self.mails], [b"\nNOOP\n"])

    def test_a_line_that_was_too_long_is_one_of_them(self):
        with Client(self.serve()) as client:
            client.send("EHLO x\n" + "x" * 20000 + "\r\nMAIL FROM:<a@b>\nRCPT TO:<c@d>\nDATA\n"
                        "one\n.\nNOOP\n\r\n.\r\nQUIT\n")
            client.rest()
            self.assertEqual([mail.data for mail in self.mails], [b"one\n\nNOOP\n\n"])

    def test_bare_lf_session(self):
        for data, expected in (("x\r\n.\r\n", b"x\n"), ("x\r\n.\n", b"x\n"), (".\n", b""),
                               ("\n.\n", b"\n"), ("..\n.\n", b".\n"), ("x\n.y\n.\n", b"x\ny\n"),
                               ("\n.\r\n.\n", b"\n\n")):
            with self.subTest(data), Client(self.serve()) as client:
                client.send("HELO x\nMAIL FROM:<a@b>\nRCPT TO:<c@d>\nDATA\n" + data + "QUIT\n")
                self.assertTrue(client.rest().endswith("221 2.0.0 Goodbye\r\n"))
                self.assertEqual([mail.data for mail in self.mails], [expected])

    def test_received_line_stands_first(self):
        with Client(self.serve(received=True)) as client:
            client.open()
            for sent, expected in ((b"Subject: x\r\n", b"Subject: x\n"), (b" x\r\n", b"\n x\n"),
                                   (b"\tx\r\n", b"\n\tx\n"), (b". x\r\n", b"\n x\n"),
                                   (b"\rx\r\n", b"\n x\n"), (b"", b""), (b"\r\n", b"\n")):
                with self.subTest(sent):
                    self.send(client, sent + b".\r\n")
                    trace, rest = self.mails[-1].data[:121], self.mails[-1].data
                    self.assertTrue(trace.startswith(
                        b"Received: from client.example ([127.0.0.1])\n\tby localhost (msmtpd) "
                        b"with ESMTP;\n\t"), trace)
                    self.assertEqual(without_trace(rest), expected)

    def test_one_that_comes_back_again_and_again_is_refused(self):
        """RFC 5321 6.3. All sessions would be taken until the first command's time is over."""
        def send_back(mail):
            came.append(mail.data.count(b"Received: "))
            with smtplib.SMTP(server.host, server.port, timeout=PATIENCE) as client:
                try:
                    client.sendmail("a@b", ["c@d"], mail.data)
                except smtplib.SMTPDataError as error:
                    raise msmtpd.PermanentFailure(error.smtp_error[6:].decode(), error.smtp_code,
                                                  error.smtp_error[:5].decode()) from None
        came = []
        server = self.serve(send_back, received=True)
        in_body = "Received: by localhost (msmtpd) with ESMTP;\r\n" * 20
        with Client(server) as client:
            self.assertRegex(client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA",
                                         "Subject: x\r\n\r\n%s." % in_body),
                             "554 5.4.6 Mail loop")
        self.assertEqual([n - 20 for n in came], [1, 2, 3, 4, 5])

    def test_no_other_mail_is_taken_for_one_that_comes_back(self):
        others, ours = ("Received: by %s with ESMTP;\r\n\tsome day\r\n" % name * 30
                        for name in ("b.example", "localhost (msmtpd)"))
        for header, received in ((others, True), (ours, False)):
            with self.subTest(received=received), \
                    Client(self.serve(received=received)) as client:
                self.assertEqual(client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA",
                                             header + "\r\nx\r\n.")[:3], "250")

    def test_large_mail_goes_through_a_file_of_ones_own(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        modes = []

        def deliver(mail):
            state = os.fstat(mail.file.fileno())
            modes.append((stat.S_IMODE(state.st_mode), state.st_nlink, os.listdir(folder)))
            self.mails.append(mail)
        body = b"".join(b"%d %s\r\n" % (n, b"." * (n % 97)) for n in range(60000))
        with mock.patch.object(tempfile, "tempdir", folder), \
                Client(self.serve(deliver)) as client:
            client.open()
            self.assertEqual(self.send(client, body + b".\r\n"), ["250 2.0.0 Delivered"])
        self.assertEqual(modes, [(0o600, 0, [])])
        self.assertEqual(self.mails[0].data, body.replace(b"\r\n", b"\n"))

    def test_no_room_for_the_mail(self):
        with mock.patch.object(tempfile, "tempdir", "/nonexistent"), \
                self.assertLogs("msmtpd", "ERROR"), Client(self.serve()) as client:
            client.open()
            line = b"x" * 998 + b"\r\n"
            self.assertEqual(self.send(client, 2000 * line + b".\r\n")[0][:9], "452 4.3.1")
            self.assertEqual(self.send(client, 1000 * line + b".\r\n")[0][:9], "250 2.0.0")
        self.assertEqual([mail.size for mail in self.mails], [999000])

    def test_disk_and_memory_that_are_full_are_noticed_at_once(self):
        def write(spool, data):
            if data:
                raise MemoryError
        self.patch(MAX_MEMORY=10)
        patches = [(msmtpd.Spool, "write", write, "cannot spool: MemoryError")]
        if os.path.exists("/dev/full"):
            patches.append((tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"),
                            "cannot spool: .*" + os.strerror(errno.ENOSPC)))
        with Client(self.serve()) as client:
            client.open()
            for *patch, words in patches:
                with self.subTest(words), self.assertLogs("msmtpd", "ERROR") as logs, \
                        mock.patch.object(*patch):
                    self.assertEqual(self.send(client, b"x" * 100 + b"\r\n.\r\n")[0][:9],
                                     "452 4.3.1")
                self.assertRegex(logs.output[0], words)
            self.assertEqual(self.send(client, b"y\r\n.\r\n")[0][:9], "250 2.0.0")
        self.assertEqual([mail.data for mail in self.mails], [b"y\n"])

    def test_a_spool_that_cannot_be_read_defers_the_mail(self):
        """It is read before the delivery, for loops."""
        with Client(self.serve(received=True)) as client:
            client.open()
            for error in OSError(errno.EIO, "broken"), MemoryError():
                with self.subTest(error), self.assertLogs("msmtpd", "ERROR") as logs, \
                        mock.patch.object(msmtpd, "count_hops", side_effect=error):
                    self.assertEqual(self.send(client, b"x\r\n.\r\n")[0][:9], "452 4.3.1")
                self.assertEqual(len(logs.output), 1)
                self.assertIn("cannot spool: ", logs.output[0])
            self.assertEqual(self.send(client, b"y\r\n.\r\n")[0][:9], "250 2.0.0")
        self.assertEqual([without_trace(mail.data) for mail in self.mails], [b"y\n"])

    def test_what_is_not_to_be_delivered_gives_its_room_back_at_once(self):
        spools, real = [], msmtpd.Spool.__init__

        def init(spool):
            spools.append(spool)
            real(spool)
        for options, body in ({"max_size": 1000}, b"x" * 300000), ({}, b"x" * 3000000):
            with mock.patch.object(msmtpd.Spool, "__init__", init), self.subTest(options), \
                    mock.patch.object(tempfile, "tempdir", "/nonexistent"), \
                    Client(self.serve(**options)) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                client.send(body)
                wait_for(lambda: spools[-1]._file.closed, "the data to be dropped")


# Delivery

SHELL_WORDS = ("a;b@c.example", "a|b@c.example", "$(touch${IFS}x)@c.example", "`touch`@c.example",
               "o'brien@c.example", "r&d@c.example", '"a b"@c.example', '"$(touch x)"@c.example',
               "a>x@c.example", "*@c.example", "~root@c.example", "a{b,c}@c.example")


class AddressRule(unittest.TestCase):
    """What is valid but not inert is accepted only where nothing can parse it again."""

    SAFE = ("cat -f %F --", "cat --", "cat --from=%F --", "cat -f%F", "/bin/cat %F", "cat '%F' --",
            'cat "%F" --', "cat -x '' \"a b\" %F", "cat 'a;b' %F", r"cat a\;b %F", "cat a=b %F",
            "/usr/bin/env cat %F")
    UNSAFE = ("cat a%F", "cat 'x %F'", "cat from=%F", "sh -c 'cat' %F", "sh -c 'cat -f %F'",
              "bash -c 'cat \"$@\"' x", "cat %F; cat", "cat $HOME %F", "cat `true` %F",
              "cat %F | cat",
              "cat <x %F", "cat *", "cat ~ %F", "A=b cat %F", "cat # %F",
              "/usr/bin/ssh host cat %F",
              "nice ssh host", "cat --rsh=ssh %F", "cat -e 'ssh -x' %F", "xargs cat", "busybox sh",
              "su -c cat", "sudo cat %F", "cat \"$HOME\" %F", "nosuchprogram %F", "cat -f %F%F",
              "exec cat %F", "/bin/bash5.2 %F", "env bash-static %F", "env systemd-run1 cat",
              "env zsh5-static",
              "env sudo.ws cat", "env su-exec cat", "cat {a,b} %F", "cat && cat", "! cat")

    def test_safe_commands_take_every_address(self):
        for text in self.SAFE:
            command = msmtpd.Command(text)
            for address in SHELL_WORDS:
                with self.subTest(text, address=address):
                    command.check(address)

    def test_other_commands_take_inert_ones_only(self):
        for text in self.UNSAFE:
            command = msmtpd.Command(text)
            with self.subTest(text):
                command.check("a.b+c=d@c.example")
                for address in SHELL_WORDS:
                    with self.assertRaises(msmtpd.PermanentFailure, msg=address):
                        command.check(address)

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
        for text in ("", "  ", "cat\ncat", "cat;", "cat &", "cat | ", "cat >", "cat <", "cat &&",
                     ">out", "cat; <in", "A=b", "cat && A=b C=d", "true && !", "if", "cat \\",
                     "cat | { ", "2>&1", "while", "A=$(true)", "exec", "exec eval", "true; command",
                     "A=1\u2028cat", "true; A=1\xa0cat",
                     "A=$(echo $(true))", "cat; B=$((1+(2)))", "cat > $(echo $(true))x; > y",
                     "cat 'x", 'cat "x', "if cat", "cat )", "cat ${"):
            with self.subTest(text), self.assertRaises(ValueError):
                msmtpd.Command(text)
        for seconds in (0, -1, float("nan")):
            with self.subTest(seconds), self.assertRaises(ValueError):
                msmtpd.Command("cat", timeout=seconds)

    def test_commands_that_may_not_work(self):
        for text, count in (("cat # %F", 1), ("cat %F #", 1), ("true;#x %F", 1),
                            ("cat <&0 # %F", 1), ("nosuchprogram %F", 1),
                            ("./nosuchprogram %F", 1), ("/dev/null %F", 1), ("/ %F", 1),
                            ("'/no/such' %F", 1), ('A=1 B=2 "nosuchprogram" %F', 1),
                            ("exec nosuchprogram %F", 1), ("A=1 exec cat %F", 0), ("'cat' %F", 0),
                            ("cat 'a # b'", 0), ("cat a#b", 0),
                            ("exec cat", 0), ("cat $(true)", 0), ("cat $(echo $(true))", 0),
                            ("cat - x$((1+1))", 0), ("tee -a $(echo $(((1+1)*2)))", 0),
                            ("f() { cat; }; f", 0), ("(true; true) && cat", 0),
                            ("case x in x) cat;; esac; cat", 0)):
            with self.subTest(text):
                self.assertEqual(len(msmtpd.Command(text).warnings), count)


class Delivery(ProgramCase):
    """The command: RFC 5321 says when to accept, sysexits.h how it tells."""

    def run_command(self, text, mail=None, **options):
        """Run a command on a mail; return the failure, or None, and the mail's outcome."""
        mail = mail or msmtpd.Mail("a@b", ["c@d"], b"x\n")
        try:
            msmtpd.Command(text, **options)(mail)
        except (msmtpd.TemporaryFailure, msmtpd.PermanentFailure) as error:
            return error, mail.outcome
        return None, mail.outcome

    def run_in_a_thread(self, *arguments):
        """The same for what might never end."""
        results = []
        thread = threading.Thread(
            target=lambda: results.append(self.run_command(*arguments)), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        self.assertTrue(results, "it does not end")
        return results[0]

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
        expected = {0: None, **dict.fromkeys(range(1, 256), (554, "5.3.0"))}
        expected.update({
            65: (554, "5.6.0"), 67: (554, "5.1.1"), 77: (554, "5.7.0"), 78: (554, "5.3.5"),
            68: (451, "4.3.0"), 69: (451, "4.3.0"), 71: (451, "4.3.0"), 75: (451, "4.3.0"),
            126: (451, "4.3.5"), 127: (451, "4.3.5")})
        script = self.script("exit", "#!/bin/sh\nexit $1\n")
        for status in (0, 1, 2, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 100,
                       111, 125, 126, 127, 128, 129, 137, 255):
            for text in ("%s %d", "%s %d || exit $?"):
                with self.subTest(text, status=status):
                    failure, outcome = self.run_command(text % (script, status))
                    reply = failure and (failure.code, failure.enhanced)
                    shell_says_signal = "||" in text and status > 128
                    self.assertEqual(reply, (451, "4.3.0") if shell_says_signal
                                     else expected[status])
                    self.assertEqual(outcome, "exit=%d" % status)

    def test_signals(self):
        for number in signal.SIGHUP, signal.SIGINT:     # which a shell may have us ignore
            before = signal.getsignal(number)
            if before is signal.SIG_IGN:        # so does, by some ways to start it, the command
                signal.signal(number, signal.SIG_DFL)
                self.addCleanup(signal.signal, number, before)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGPIPE,
                       signal.SIGTERM, signal.SIGSEGV):
            script = self.script("die", "#!/bin/sh\nulimit -c 0; kill -%d $$\n" % number)
            failure, outcome = self.run_command(script)
            self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
            self.assertEqual(outcome, "exit=signal %d" % number)

    def test_what_cannot_be_started(self):
        plain = os.path.join(self.folder, "plain")
        for change in (lambda: os.chmod(plain, 0o644), lambda: os.remove(plain),
                       lambda: (os.remove(plain), os.mkdir(plain))):
            command = msmtpd.Command(self.script("plain", "#!/bin/sh\n"))
            change()
            with self.assertRaises(msmtpd.TemporaryFailure) as caught:
                command(msmtpd.Mail("a@b", ["c@d"], b"x\n"))
            self.assertEqual((caught.exception.code, caught.exception.enhanced), (451, "4.3.5"))
        folder = os.path.join(self.folder, "bin")
        os.mkdir(folder)
        command = msmtpd.Command(self.script("bin/plain", "#!/bin/sh\n"))
        shutil.rmtree(folder)
        self.script("bin", "")          # a folder on its way became a file
        with self.assertRaises(msmtpd.TemporaryFailure) as caught:
            command(msmtpd.Mail("a@b", ["c@d"], b"x\n"))
        self.assertEqual((caught.exception.code, caught.exception.enhanced), (451, "4.3.5"))
        os.remove(folder)
        self.assertEqual(self.run_command("nosuchprogram")[0].enhanced, "4.3.5")

    def test_a_script_without_an_interpreter_line_is_the_shells(self):
        script = self.script("bare", "cat > %s/out; exit 75\n" % self.folder)
        self.assertEqual(self.run_command(script)[1], "exit=75")

    def test_only_the_status_decides(self):
        large = msmtpd.Mail("a@b", ["c@d"], b"x" * 3000000 + b"\n")
        middle = msmtpd.Mail("a@b", ["c@d"], b"x" * 900000 + b"\n")
        for mail in (large, middle):
            self.assertEqual(self.run_command("true", mail), (None, "exit=0"))
            self.assertEqual(self.run_command("sh -c 'exec <&-; exit 0'", mail)[1], "exit=0")
            self.assertEqual(self.run_command("cat >/dev/null; exit 1; :", mail)[1], "exit=1")

    def test_mails_of_any_size_arrive_whole(self):
        for size in (0, 1, 4096, 65535, 65536, 65537, 200000, 1048576, 1048577, 3000000):
            mail = msmtpd.Mail("a@b", ["c@d"], os.urandom(size))
            self.assertEqual(self.run_command(self.capture, mail)[1], "exit=0")
            self.assertEqual(self.delivered()[-1][1], mail.data)

    @unittest.skipUnless(sys.platform == "linux", "no way to have a small pipe")
    def test_mails_that_a_pipe_does_not_hold_arrive_whole(self):
        def pipe():
            reader, writer = real()
            fcntl.fcntl(writer, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)  # from Python 3.10 on
            return reader, writer
        real, real_write = os.pipe, os.write
        for write in real_write, mock.Mock(side_effect=OSError(errno.ENOMEM, "none"), spec=()):
            mail = msmtpd.Mail("a@b", ["c@d"], os.urandom(60000))
            before = open_descriptors()
            with mock.patch.object(os, "pipe", pipe), mock.patch.object(os, "write", write), \
                    mock.patch.object(tempfile, "tempdir", "/nonexistent"):
                self.assertEqual(self.run_in_a_thread(self.capture, mail)[1], "exit=0")
            self.assertEqual(self.delivered()[-1][1], mail.data)
            self.assertEqual(open_descriptors(), before + 1)    # that of the mail itself

    def test_a_mail_that_was_looked_at_arrives_whole(self):
        for size in (100, 100000, 3000000):
            mail = msmtpd.Mail("a@b", ["c@d"], b"Subject: x\n" + b"y" * size + b"\n")
            before = mail.data
            mail.file.readline()
            self.assertEqual(self.run_command(self.capture, mail)[1], "exit=0")
            self.assertEqual(self.delivered()[-1][1], before)
            self.run_command("head -c 10 >/dev/null; true", mail)
            self.assertEqual((mail.data, mail.file.readline()), (before, b"Subject: x\n"))

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
        for trap, text in (("", "signal"), ("trap '' TERM", "KILL"), ("trap 'exit 0' TERM", "0")):
            with mock.patch.object(msmtpd, "KILL_DELAY", 0.1), self.subTest(text):
                script = self.script("hang", "#!/bin/sh\n%s\nsleep 60 &\necho $! > %s/pid\n"
                                     "while :; do sleep 0.05; done\n" % (trap, self.folder))
                failure, outcome = self.run_command(script, timeout=0.2)
                self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
                self.assertEqual(outcome, "exit=timeout")
                with open(os.path.join(self.folder, "pid"), encoding="ascii") as file:
                    pid = int(file.read())
                wait_for(lambda pid=pid: not is_running(pid), "the rest of the group to end")

    def test_a_time_limit_of_years(self):
        self.assertEqual(self.run_command("sleep 0.05; :", timeout=9e8)[1], "exit=0")

    def test_an_interrupted_delivery_ends_its_command(self):
        script = self.script("slow", "#!/bin/sh\necho $$ > %s/pid\nexec sleep 60\n" % self.folder)
        path = os.path.join(self.folder, "pid")

        def work(run, seconds):
            wait_for(lambda: os.path.exists(path) and os.path.getsize(path), "the command")
            raise KeyboardInterrupt
        with mock.patch.object(msmtpd._Run, "_work", work), self.assertRaises(KeyboardInterrupt):
            self.run_command(script)
        with open(path, encoding="ascii") as file:
            pid = int(file.read())
        wait_for(lambda: not is_running(pid), "the command to end")

    def test_one_that_was_reaped_gets_no_signal(self):
        """Its number may be another's by now."""
        with mock.patch.object(msmtpd._Run, "_close", autospec=True) as close:
            self.assertEqual(self.run_command("true")[1], "exit=0")
        run, = close.call_args[0]
        run._close()
        with mock.patch.object(os, "killpg") as killpg:
            run.kill(signal.SIGTERM)
        killpg.assert_not_called()

    def test_all_that_a_shell_started_may_end_in_good_order(self):
        script = self.script("slow", "#!/bin/sh\ntrap 'sleep 0.5; touch %s/done; exit 0' TERM\n"
                             "while :; do sleep 0.05; done\n" % self.folder)
        self.assertEqual(self.run_command(script + " && :", timeout=0.2)[1], "exit=timeout")
        self.assertTrue(os.path.exists(os.path.join(self.folder, "done")))
        script = self.script("deaf", "#!/bin/sh\n(trap '' TERM; exec sleep 60) &\n"
                             "echo $! > %s/pid\nexec sleep 60\n" % self.folder)
        with mock.patch.object(msmtpd, "KILL_DELAY", 0.1):
            self.assertEqual(self.run_command(script, timeout=0.2)[1], "exit=timeout")
        with open(os.path.join(self.folder, "pid"), encoding="ascii") as file:
            pid = int(file.read())
        wait_for(lambda: not is_running(pid), "who ignores SIGTERM to end")

    def test_one_that_cannot_be_ended_holds_nothing_up(self):
        command = msmtpd.Command(self.script(
            "hang", "#!/bin/sh\nread line\n[ \"$line\" = x ] || exit 0\n"
            "echo $$ > %s/pid\nexec sleep 60\n" % self.folder), timeout=0.2)
        mail = msmtpd.Mail("a@b", ["c@d"], b"x\n")
        with mock.patch.object(msmtpd, "KILL_DELAY", 0.1), \
                mock.patch.object(os, "killpg", side_effect=PermissionError):
            with self.assertRaises(msmtpd.TemporaryFailure):
                command(mail)
        self.assertEqual(mail.outcome, "exit=timeout")
        with mock.patch.object(msmtpd, "MAX_LEFT", 1), \
                self.assertRaisesRegex(msmtpd.TemporaryFailure, "do not end"):
            command(msmtpd.Mail("a@b", ["c@d"], b"y\n"))
        with open(os.path.join(self.folder, "pid"), encoding="ascii") as file:
            pid = int(file.read())
        self.assertTrue(is_running(pid))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not is_running(pid), "its end")

        def is_reaped():        # by the next mail, where all of its threads have ended, too
            command(msmtpd.Mail("a@b", ["c@d"], b"y\n"))
            return not command._left
        wait_for(is_reaped, "it to be reaped")
        self.assertRaises(ChildProcessError, os.waitpid, pid, os.WNOHANG)

    def test_one_that_two_threads_reap_has_ended_for_both(self):
        command = msmtpd.Command("true")
        run = msmtpd._Run(command._start, command._program, [b"true"], msmtpd.Mail("a@b"), 1)
        self.addCleanup(run._close)
        real = os.waitpid

        def waitpid(pid, options):      # the first thread has looked, and not gone on yet
            with mock.patch.object(os, "waitpid", real):
                wait_for(run.reap, "the other to reap it")
            return 0, 0
        with mock.patch.object(os, "waitpid", waitpid):
            self.assertTrue(run.reap())
        self.assertEqual((run.ended, run.status), (True, 0))
        with mock.patch.object(os, "waitpid", side_effect=AssertionError):
            self.assertTrue(run.reap())     # and its number may be another's by now

    def test_children_left_behind_hold_nothing_up(self):
        script = self.script("fork", "#!/bin/sh\nsleep 60 <&0 &\necho $! > %s/pid\n" % self.folder)
        started = time.monotonic()
        self.assertEqual(self.run_command(script)[1], "exit=0")
        self.assertLess(time.monotonic() - started, 30)
        with open(os.path.join(self.folder, "pid"), encoding="ascii") as file:
            os.kill(int(file.read()), signal.SIGKILL)
        script = self.script("fork", "#!/bin/sh\nyes >&2 &\nsleep 0.1\nexit 1\n")
        with mock.patch.object(msmtpd, "CHUNK", 1):     # so that there is always more
            self.assertEqual(self.run_in_a_thread(script)[1], "exit=1")

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "no /proc")
    def test_what_it_inherits(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        os.set_inheritable(writer, True)
        with tempfile.TemporaryFile("w+") as output:
            for text in ("ls /proc/self/fd", "cat /proc/self/status",
                         "cut -d' ' -f1,5,6 /proc/self/stat"):
                self.run_command(text, msmtpd.Mail("a@b"), stdout=output.fileno())
            output.seek(0)
            lines = output.read().splitlines()
        self.assertEqual(lines[:4], ["0", "1", "2", "3"])      # 3 is the folder that ls reads
        self.assertRegex(lines[4], "Name:")
        ignored = int(next(line for line in lines if line.startswith("SigIgn:")).split()[1], 16)
        self.assertEqual(ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1), 0)
        pid, group, session = lines[-1].split()
        self.assertEqual((group, session), (pid, pid))

    @unittest.skipUnless(HAS_POSIX_SPAWN, "no glibc 2.34")
    def test_its_signals_are_not_those_of_its_host(self):
        before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGUSR1, before)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        with tempfile.TemporaryFile("w+") as output:
            self.run_command("grep -h -e SigBlk -e SigIgn /proc/self/status /dev/null",
                             msmtpd.Mail("a@b"), stdout=output.fileno())
            output.seek(0)
            blocked, ignored = (int(line.split()[1], 16) for line in output)
        self.assertEqual((blocked, ignored & (1 << 31) - 1), (0, 0))    # beyond are glibc's own

    def test_its_environment_is_that_of_when_it_was_made(self):
        with mock.patch.dict(os.environ, {"MSMTPD_TEST": "\udcff before"}):
            command = msmtpd.Command(
                "sh -c 'printf %%s \"$MSMTPD_TEST\" > %s/out'" % self.folder)
        command(msmtpd.Mail("a@b", ["c@d"]))
        with open(os.path.join(self.folder, "out"), "rb") as file:
            self.assertEqual(file.read(), b"\xff before")

    def test_no_argument_is_cut_at_a_nul(self):
        for sender, recipients in (("a\0@b", ["c@d"]), ("a@b", ["c@d", "e@f\0.g"])):
            failure, _ = self.run_command(
                self.capture + " -f %F", msmtpd.Mail(sender, recipients, b"x\n"))
            self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
        self.assertEqual(self.delivered(), [])

    @unittest.skipUnless(HAS_POSIX_SPAWN, "no glibc 2.34")
    def test_it_is_not_started_with_other_descriptors(self):
        """And what glibc allocates for them is given back."""
        destroyed = []

        class Glibc(ctypes.PyDLL):
            wrong = 0

            def posix_spawn_file_actions_destroy(self, actions):
                destroyed.append(actions)

            def posix_spawn_file_actions_adddup2(self, actions, old, new):
                return errno.ENOMEM if new == self.wrong else 0

            def posix_spawn_file_actions_addclosefrom_np(self, actions, lowest):
                return errno.ENOMEM if lowest == self.wrong else 0

        for Glibc.wrong in (0, 2, 3):
            with mock.patch.object(ctypes, "PyDLL", Glibc):
                failure, _ = self.run_command(self.capture)
            self.assertEqual((failure.code, failure.enhanced), (451, "4.3.0"))
        self.assertEqual((self.delivered(), len(destroyed)), ([], 3))

    def test_where_its_host_lacks_a_descriptor(self):
        script = ("import os, sys; sys.path.append(sys.argv[1]); import msmtpd\n"
                  "number = int(sys.argv[3])\n"
                  "command = msmtpd.Command(sys.argv[2])\n"
                  "os.close(number)\n"
                  "try: command(msmtpd.Mail('a@b', ['c@d'], b'x\\n'))\n"
                  "except msmtpd.TemporaryFailure: pass\n"
                  "else: os._exit(1)\n"
                  "try: msmtpd.Command(sys.argv[2])\n"
                  "except ValueError as error: os._exit('closed' not in str(error))\n"
                  "os._exit(2)")
        for number in range(3):
            with self.subTest(number):
                subprocess.run([sys.executable, "-c", script, os.path.dirname(PROGRAM),
                                self.capture, str(number)], timeout=PATIENCE, check=True)
        self.assertEqual(self.delivered(), [])
        with self.assertRaises(ValueError):
            msmtpd.Command(self.capture, stdout=0)

    @unittest.skipUnless(HAS_POSIX_SPAWN, "no glibc 2.34")
    def test_python_need_not_stand_still_while_it_is_started(self):
        script = ("import sys; sys.path.append(sys.argv[1]); import msmtpd\n"
                  "msmtpd.Command('true')(msmtpd.Mail('a@b', ['c@d'], b'x\\n'))\n"
                  "sys.exit('subprocess' in sys.modules)")
        subprocess.run([sys.executable, "-c", script, os.path.dirname(PROGRAM)],
                       timeout=PATIENCE, check=True)

    def test_without_pidfd(self):
        with mock.patch.object(os, "pidfd_open", side_effect=OSError, create=True):
            self.repeat(self.test_arguments_and_input, self.test_signals, self.test_time_limit,
                        self.test_its_words_end_the_reply,
                        self.test_children_left_behind_hold_nothing_up,
                        self.test_mails_of_any_size_arrive_whole)

    def test_without_memory_that_has_a_descriptor(self):
        with mock.patch.object(os, "memfd_create", side_effect=OSError, create=True):
            self.repeat(self.test_mails_of_any_size_arrive_whole,
                        self.test_a_mail_that_was_looked_at_arrives_whole,
                        self.test_only_the_status_decides, self.test_no_descriptor_is_left_open)
            mail = msmtpd.Mail("a@b", ["c@d"], b"x" * 200000)
            if os.path.exists("/dev/full"):
                with mock.patch.object(tempfile, "TemporaryFile",
                                       lambda prefix: open("/dev/full", "w+b")):
                    failure = self.run_command("cat", mail)[0]
                self.assertEqual((failure.code, failure.enhanced), (452, "4.3.1"))
            self.assertEqual(self.run_command(self.capture, mail)[1], "exit=0")
            self.assertEqual(self.delivered()[-1][1], b"x" * 200000)

    def test_without_proc(self):
        def open_(path, *arguments, **options):
            if str(path).startswith("/proc/"):
                raise FileNotFoundError(errno.ENOENT, "none", path)
            return real(path, *arguments, **options)
        real = os.open
        with mock.patch.object(os, "open", open_):
            self.repeat(self.test_mails_of_any_size_arrive_whole,
                        self.test_a_mail_that_was_looked_at_arrives_whole)

    def test_without_posix_spawn(self):
        for error in AttributeError, OSError, MemoryError, ImportError:
            with mock.patch.object(msmtpd, "_glibc_spawn", side_effect=error), self.subTest(error):
                self.repeat(self.test_what_it_inherits)
                if error is ImportError:
                    self.repeat_most()

    @unittest.skipUnless(hasattr(os, "posix_spawn"), "no posix_spawn")
    def test_alone(self):
        """The short way of inetd's one mail, also where the system knows no new sessions."""
        starter, posix_spawn = msmtpd._Starter, os.posix_spawn

        def without_sessions(*arguments, setsid=False, **more):
            if setsid:
                raise NotImplementedError
            return posix_spawn(*arguments, **more)
        with mock.patch.object(msmtpd, "_Starter", lambda alone: starter(True)):
            self.repeat_most()
            self.repeat(self.test_its_signals_are_not_those_of_its_host,
                        self.test_no_argument_is_cut_at_a_nul)
            with mock.patch.object(os, "posix_spawn", without_sessions):
                self.repeat(self.test_arguments_and_input, self.test_what_it_inherits)

    def repeat_most(self):
        self.repeat(self.test_arguments_and_input, self.test_exit_statuses, self.test_signals,
                    self.test_what_cannot_be_started, self.test_time_limit,
                    self.test_a_script_without_an_interpreter_line_is_the_shells,
                    self.test_its_words_end_the_reply,
                    self.test_its_environment_is_that_of_when_it_was_made,
                    self.test_a_lost_status_is_no_success,
                    self.test_one_that_cannot_be_ended_holds_nothing_up,
                    self.test_no_descriptor_is_left_open)

    def repeat(self, *tests):
        """Run tests again, after what they left behind was removed."""
        for test in tests:
            shutil.rmtree(os.path.join(self.folder, "mails"))
            os.mkdir(os.path.join(self.folder, "mails"))
            test()

    def test_a_lost_status_is_no_success(self):
        command, mail = msmtpd.Command("true"), msmtpd.Mail("a@b", ["c@d"], b"x\n")
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            with self.assertRaises(msmtpd.TemporaryFailure):
                command(mail)
            with self.assertRaisesRegex(ValueError, "SIGCHLD"):     # or clients would try for ever
                msmtpd.Command("true")
        finally:
            signal.signal(signal.SIGCHLD, before)
        self.assertEqual(mail.outcome, "exit=lost")

    def test_no_descriptor_is_left_open(self):
        gone = msmtpd.Command(self.script("gone", "#!/bin/sh\n"))
        os.remove(os.path.join(self.folder, "gone"))
        gc.collect()        # what the tests before have left
        before = open_descriptors()
        for size in (1, 100000, 2000000):
            for text in ("true", "false", "nosuchprogram", "cat >/dev/null; true"):
                self.run_command(text, msmtpd.Mail("a@b", ["c@d"], b"x" * size))
            with self.assertRaises(msmtpd.TemporaryFailure):
                gone(msmtpd.Mail("a@b", ["c@d"], b"x" * size))
        self.assertEqual(open_descriptors(), before)


def is_running(pid):
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        with open("/proc/%d/stat" % pid, encoding="latin-1") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return os.path.exists("/proc/self") is False


# Authentication

def encoded(text):
    return base64.b64encode(text.encode()).decode()


class Authentication(ServerCase):
    """RFC 4954 with PLAIN (RFC 4616) and LOGIN."""

    RIGHT, WRONG = encoded("\0user\0secret"), encoded("\0user\0wrong")

    def setUp(self):
        self.patch(AUTH_DELAY=0.0)

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
            C: AUTH PLAIN !!!!
            S: 501 5.5.2
            C: AUTH PLAIN YWJj
            S: 501 5.5.2
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

    def test_login(self):
        for lines in (("AUTH LOGIN", "334 VXNlcm5hbWU6", encoded("user"), "334 UGFzc3dvcmQ6",
                       encoded("secret"), "235 2.7.0"),
                      ("auth login " + encoded("user"), "334 UGFzc3dvcmQ6", encoded("secret"),
                       "235 2.7.0"),
                      ("AUTH LOGIN " + encoded("user"), "334 UGFzc3dvcmQ6", "*", "501 5.5.2"),
                      ("AUTH LOGIN =", "334 UGFzc3dvcmQ6", encoded("secret"), "535 5.7.8"),
                      ("AUTH LOGIN  " + encoded("user"), "334 UGFzc3dvcmQ6", encoded("secret"),
                       "235 2.7.0"), ("AUTH PLAIN  " + self.RIGHT, "235 2.7.0"),
                      ("AUTH LOGIN /w==", "334 UGFzc3dvcmQ6", encoded("secret"), "501 5.5.2"),
                      ("AUTH LOGIN " + encoded("user"), "334 UGFzc3dvcmQ6", "/w==", "501 5.5.2"),
                      ("AUTH LOGIN", "334 VXNlcm5hbWU6", "us", "501 5.5.2")):
            with self.subTest(lines), Client(self.serve()) as client:
                client.open()
                for sent, expected in zip(lines[::2], lines[1::2]):
                    self.assertEqual(client.do(sent)[:len(expected)], expected)

    def test_responses_that_are_none(self):
        self.patch(MAX_ERRORS=100)
        with Client(self.serve()) as client:
            client.open()
            for response in (self.RIGHT[:5] + "!" + self.RIGHT[5:], self.RIGHT[:5] + " "
                             + self.RIGHT[5:], self.RIGHT[:-1], "YW-_", self.RIGHT + "\u00fc",
                             encoded("user\0secret"),
                             encoded("\0user\0secret\0x"),
                             base64.b64encode(b"\0user\0\xff").decode()):
                for lines in ["AUTH PLAIN " + response], ["AUTH PLAIN", response]:
                    with self.subTest(lines):
                        self.assertEqual(client.do(*lines)[:9], "501 5.5.2")
            self.assertEqual(client.do("AUTH PLAIN " + self.RIGHT)[:3], "235")

    def test_any_authorization_identity_and_long_responses(self):
        long = "p" * 8000
        server = self.serve(authenticate=msmtpd.one_user("user", long))
        for verb in "AUTH PLAIN ", "auth plain ":
            with Client(server) as client:
                response = encoded("someone\0user\0" + long)
                self.assertEqual(client.open(verb + response)[:3], "235")
        with Client(server) as client:
            self.assertEqual(client.open("AUTH PLAIN", encoded("\0user\0" + long))[:3], "235")
        with Client(server) as client:
            self.assertEqual(client.open("AUTH PLAIN", "x" * 12287)[:9], "500 5.5.2")
            self.assertEqual(client.do("NOOP")[:3], "250")

    def test_helo_after_it_makes_no_other_protocol(self):
        with Client(self.serve(received=True)) as client:
            client.open("AUTH PLAIN " + self.RIGHT, "HELO x", "MAIL FROM:<a@b>", "RCPT TO:<c@d>",
                        "DATA", "x\r\n.")
        self.assertIn(b" with ESMTPA;", self.mails[0].data)

    def test_not_in_a_transaction(self):
        with Client(self.serve()) as client:
            client.open("AUTH PLAIN " + self.RIGHT, "MAIL FROM:<a@b>")
            self.assertEqual(client.do("AUTH PLAIN " + self.RIGHT)[:9], "503 5.5.1")

    def test_no_line_with_a_password_is_kept(self):
        msmtpd._split_cached.cache_clear()
        with Client(self.serve()) as client:
            client.reply()
            client.do("AUTH LOGIN", encoded("user"), encoded("secret"))     # not before EHLO
            client.do("EHLO x", "AUTH PLAIN " + self.WRONG, "auth plain " + self.WRONG[::-1],
                      " AUTH PLAIN " + self.WRONG)
            self.assertEqual(client.do("AUTH PLAIN", self.RIGHT)[:3], "235")
        self.assertEqual(msmtpd._split_cached.cache_info().currsize, 1)      # EHLO

    def test_no_web_page_in_between(self):
        with Client(self.serve()) as client:
            self.assertEqual(client.open("AUTH LOGIN", "POST / HTTP/1.1")[:9], "421 4.7.0")
            self.assertEqual(client.rest(), "")

    def test_third_failure_ends_the_session(self):
        with Client(self.serve()) as client:
            client.open("AUTH PLAIN " + self.WRONG, "AUTH PLAIN !", "AUTH PLAIN " + self.WRONG)
            self.assertEqual(client.do("AUTH PLAIN " + self.WRONG)[:9], "421 4.7.0")
            self.assertEqual(client.rest(), "")

    def test_failures_make_all_answers_late(self):
        delays = []
        with mock.patch.object(msmtpd.time, "sleep", delays.append):
            check = msmtpd.Authenticator(msmtpd.one_user("user", "secret"))
            self.assertTrue(check.verify("user", "secret"))
            self.assertEqual(len(delays), 0)
            self.assertFalse(check.verify("user", "wrong"))
            self.assertEqual(len(delays), 1)
            self.assertTrue(check.verify("user", "secret"))
            self.assertEqual(len(delays), 2)
            later = time.monotonic() + msmtpd.AUTH_MEMORY + 1
            with mock.patch.object(msmtpd.time, "monotonic", lambda: later):
                self.assertTrue(check.verify("user", "secret"))
            self.assertEqual(len(delays), 2)
            check = msmtpd.Authenticator(msmtpd.one_user("user", "secret"), always_late=True)
            self.assertTrue(check.verify("user", "secret"))
            self.assertEqual(len(delays), 3)

    def test_every_answer_is_late_where_no_failure_can_be_remembered(self):
        delays = []
        ours, theirs = socket.socketpair()
        with ours, theirs, mock.patch.object(time, "sleep", delays.append):
            ours.sendall(("EHLO x\r\nAUTH PLAIN %s\r\nQUIT\r\n" % self.RIGHT).encode())
            server = msmtpd.Server(print, authenticate=msmtpd.one_user("user", "secret"))
            self.assertTrue(server.serve_descriptors(theirs.fileno(), theirs.fileno()))
            self.assertIn(b"\r\n235 2.7.0", ours.recv(10000))
        self.assertEqual(delays, [msmtpd.AUTH_DELAY])

    def test_only_the_right_pair(self):
        check = msmtpd.one_user("\u00fcser", "s\u00e9cret")
        self.assertTrue(check("\u00fcser", "s\u00e9cret"))
        for user, password in (("\u00fcser", ""), ("", "s\u00e9cret"), ("", ""), ("user", "secret"),
                               ("\u00fcser", "s\u00e9cret "), ("\u00fcser ", "s\u00e9cret")):
            self.assertFalse(check(user, password))
        self.assertFalse(msmtpd.one_user("\udcff", "x")("user", "x"))

    def test_async_functions_are_no_deliver(self):
        async def deliver(mail):
            self.mails.append(mail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)     # never awaited
            with self.assertLogs("msmtpd", "ERROR") as logs, \
                    Client(super().serve(deliver)) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                self.assertEqual(client.do("x\r\n.")[:9], "451 4.3.0")
            self.assertIn("not async ones", "".join(logs.output))
            del logs        # which holds the traceback, and so the coroutine
            gc.collect()
        self.assertEqual([str(each.message) for each in caught
                          if each.category is RuntimeWarning], [])

    def test_only_true_is_a_yes(self):
        async def later(user, password):
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # never awaited
            for answer in (later, lambda *_: None, lambda *_: "no", lambda *_: object()):
                with Client(self.serve(authenticate=answer)) as client:
                    self.assertEqual(client.open("AUTH PLAIN " + self.RIGHT)[:3], "535")

    def test_may_be_asked_of_an_object_that_is_false(self):
        class Users(dict):
            def __call__(self, user, password):
                return self.get(user) == password
        users = Users()
        server = self.serve(authenticate=users)
        with Client(server) as client:
            self.assertEqual(client.open("MAIL FROM:<a@b>")[:3], "530")
            users["user"] = "secret"
            self.assertEqual(client.do("AUTH PLAIN " + self.RIGHT)[:3], "235")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\n")
            ours.shutdown(socket.SHUT_WR)
            msmtpd.Server(print, authenticate=Users()).serve_descriptors(
                theirs.fileno(), theirs.fileno())
            self.assertIn(b"\r\n530 ", ours.recv(10000))

    def test_what_is_empty_is_never_right(self):
        """RFC 4616 section 2. A directory that binds without a name would say yes."""
        yes = mock.Mock(return_value=True, spec=())
        for lines in (["AUTH PLAIN " + encoded("\0user\0")], ["AUTH PLAIN " + encoded("\0\0x")],
                      ["AUTH LOGIN " + encoded("user"), ""], ["AUTH LOGIN " + encoded("user"), "="],
                      ["AUTH LOGIN", "", encoded("x")], ["AUTH PLAIN " + encoded("a\0\0")]):
            with self.subTest(lines), Client(self.serve(authenticate=yes)) as client:
                self.assertEqual(client.open(*lines)[:9], "535 5.7.8")
                self.assertEqual(client.do("MAIL FROM:<a@b>")[:3], "530")
        yes.assert_not_called()

    def test_an_exception_says_nothing(self):
        def authenticate(user, password):
            raise KeyError(password)
        with self.assertLogs("msmtpd") as logs, \
                Client(self.serve(authenticate=authenticate)) as client:
            reply = client.open("AUTH PLAIN " + self.RIGHT)
        self.assertEqual(reply[:9], "454 4.7.0")
        self.assertNotIn("secret", reply + "".join(logs.output))


# Serving

class Slots(ServerCase):
    """Sessions are bounded, and nobody can keep others out."""

    def test_further_clients_wait(self):
        server = self.serve(max_sessions=2)
        with Client(server) as first, Client(server) as second:
            first.open()
            second.open()
            with Client(server) as third:
                self.assertEqual(select.select([third.socket], [], [], 0.2)[0], [])
                first.do("QUIT")
                self.assertEqual(third.do("EHLO x"), "220 localhost ESMTP msmtpd")

    def test_silent_clients_give_way_when_all_slots_are_taken(self):
        self.patch(FULL_TIMEOUT=0.3)
        server = self.serve(max_sessions=3)
        with Client(server) as first, Client(server) as second, Client(server) as third, \
                Client(server) as fourth:
            second.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            self.assertEqual(fourth.reply(), ["220 localhost ESMTP msmtpd"])
            said = [client.socket.recv(500) for client in (first, second, third)
                    if select.select([client.socket], [], [], 0)[0]]
            self.assertIn(b"421 4.4.2", b"".join(said))

    def test_a_farewell_is_short_when_all_slots_are_taken(self):
        ours, theirs = socket.socketpair()
        slots = msmtpd.Slots(*socket.socketpair())
        self.addCleanup(slots.close)
        slots.waiting = ()
        with ours, theirs:
            began = time.monotonic()
            msmtpd.Wire.of_socket(theirs, slots, 9.0).close(b"421 x\r\n", linger=True)
            self.assertLess(time.monotonic() - began, 0.8)
            self.assertEqual(ours.recv(100), b"421 x\r\n")

    def test_silent_clients_stay_while_there_is_room(self):
        self.patch(FULL_TIMEOUT=0.1)
        server = self.serve(max_sessions=2)
        with Client(server) as client:
            client.open()
            self.assertEqual(select.select([client.socket], [], [], 1.5)[0], [])
            self.assertEqual(client.do("NOOP")[:3], "250")
            self.assertEqual(select.select([client.socket], [], [], 0.3)[0], [])
            with Client(server) as other:       # one that is not silent has the last place
                other.open()
                end = time.monotonic() + 5
                while not select.select([client.socket], [], [], 0.02)[0]:
                    self.assertEqual(other.do("NOOP")[:3], "250")
                    self.assertLess(time.monotonic(), end, "nobody looks again")
            self.assertEqual(client.rest()[:9], "421 4.4.2")

    def test_threads_are_kept_and_reused(self):
        threads = set()
        server = self.serve(lambda mail: threads.add(threading.current_thread()), max_sessions=2)
        for _ in range(30):
            with Client(server) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n.", "QUIT")
        self.assertIn(len(threads), (1, 2))

    def test_accept_may_fail(self):
        """It is tried less and less often; each time that it begins to fail is logged once.

        That a client has left the queue is no failure.
        """
        server, delays, failures = self.serve(max_sessions=1), [], []
        (number, real), = server._workers._listeners._sockets.items()

        class Listener:
            fileno, close = real.fileno, real.close

            def accept(self):
                if failures:
                    raise failures.pop()
                return real.accept()
        server._workers._listeners._sockets[number] = Listener()
        with mock.patch.object(time, "sleep", delays.append), \
                self.assertLogs("msmtpd", "ERROR") as logs:
            for times in 6, 2:
                failures += [OSError(24, "Too many open files")] * times
                failures.append(ConnectionAbortedError(103, "Software caused connection abort"))
                with Client(server) as client:
                    self.assertEqual(client.open("QUIT")[:3], "221")
                self.assertEqual(failures, [])
        self.assertEqual(delays, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 0.1, 0.2])
        self.assertEqual(len(logs.output), 2)

    def test_a_session_that_cannot_be_made_takes_none_of_them(self):
        class Bad(msmtpd.Session):
            def __init__(self, *arguments):
                if failures:
                    raise failures.pop()
                super().__init__(*arguments)
        for error in ArithmeticError("why"), SystemExit("why"):
            failures = [error]
            with self.assertLogs("msmtpd", "ERROR") as logs:
                server = self.serve(session=Bad, max_sessions=1)
                self.assertEqual(self.client(server).rest(), "")
                self.assertEqual(self.client(server).line(), "220 localhost ESMTP msmtpd")
            self.assertIn("a session ended by an error", logs.output[0])

    @unittest.skipUnless(hasattr(select, "epoll"), "no epoll")
    def test_a_wait_that_fails_loses_no_client(self):
        server = self.serve(max_sessions=1)
        listeners = server._workers._listeners
        real, failures = listeners._epoll, [MemoryError()]

        class Epoll:
            """Fails once when the kernel has handed out the event, which it does only once."""

            modify, close = real.modify, real.close

            @staticmethod
            def poll(*arguments):
                ready = real.poll(*arguments)
                if failures:
                    raise failures.pop()
                return ready
        with Client(server) as client:      # so that the thread waits anew
            client.open()
            listeners._epoll = Epoll
        with self.assertLogs("msmtpd", "ERROR") as logs, Client(server) as client:
            self.assertEqual(client.open()[:3], "250")
        self.assertEqual(failures, [])
        self.assertEqual([record.getMessage() for record in logs.records],
                         ["cannot accept, will try again: MemoryError"])

    def test_threads_take_turns_where_there_is_no_epoll(self):
        with mock.patch.object(select, "epoll", side_effect=OSError(38, "none"), create=True):
            server = self.serve(host=["127.0.0.1", "127.0.0.2"], max_sessions=3)
        for host in ("127.0.0.1", "127.0.0.2") * 3:
            clients = [self.client((host, server.port)) for _ in range(5)]
            for client in clients:      # the last two wait until others have left
                client.send("EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
                            "DATA\r\nx\r\n.\r\nQUIT\r\n")
            for client in clients:
                self.assertEqual(client.rest().splitlines()[-1], "221 2.0.0 Goodbye")
        self.assertEqual(len(self.mails), 30)
        server.stop()
        with self.assertRaises(ConnectionRefusedError):
            Client(server)

    def test_once_the_server_stops_nobody_tries_to_accept(self):
        with mock.patch.object(select, "epoll", side_effect=OSError(38, "none"), create=True):
            server = self.serve()
        (number, real), = server._workers._listeners._sockets.items()
        accept = mock.Mock(side_effect=OSError(errno.ENFILE, "Too many open files in system"))
        server._workers._listeners._sockets[number] = mock.Mock(accept=accept, close=real.close)
        with self.assertLogs("msmtpd", "ERROR"), mock.patch.object(
                time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.001)):
            self.client(server)
            wait_for(lambda: accept.called, "a try")
            server.drain(0, PATIENCE)
            tries = accept.call_count
            server.stop()
        self.assertLessEqual(accept.call_count, tries + 1)      # one was on its way

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "no Unix sockets")
    def test_unix_sockets(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen()
        server = self.serve(sockets=[listener], received=True)
        self.assertEqual(server.addresses, [msmtpd.Peer(None, None)])
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
            client.sendall(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"
                           b"DATA\r\nx\r\n.\r\nQUIT\r\n")
            self.assertEqual(client.makefile("rb").read()[-21:], b"\r\n221 2.0.0 Goodbye\r\n")
        self.assertTrue(self.mails[0].data.startswith(b"Received: from x\n\tby localhost"))
        self.assertEqual(msmtpd.peer_of((2, 25)), msmtpd.Peer(None, None))      # as AF_VSOCK has it

    def test_small_replies_are_not_held_back(self):
        with mock.patch.object(msmtpd.Wire, "of_socket", wraps=msmtpd.Wire.of_socket) as made, \
                Client(self.serve()) as client:
            client.open()
            connection = made.call_args[0][0]
            self.assertTrue(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def test_threads_may_be_not_to_be_had(self):
        start, left = threading.Thread.start, [1, 1, 1, 1]

        def start_four(thread):
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
            start(thread)
        with mock.patch.object(threading.Thread, "start", start_four), \
                self.assertLogs("msmtpd", "ERROR") as logs:
            server = self.serve()
        self.assertIn("no more than 2 sessions", logs.output[0])
        with Client(server) as first, Client(server) as second:
            self.assertEqual((first.open()[:3], second.open()[:3]), ("250", "250"))
        wait_for(lambda: sum(t.name.startswith("msmtpd-") for t in threading.enumerate()) == 2,
                 "those above half of them to end, for the commands' sake")
        with mock.patch.object(threading.Thread, "start", start_four), \
                self.assertRaises(RuntimeError):
            self.serve()

    @needs_ipv6
    def test_dual_stack(self):
        server = self.serve(host="::")
        for host in ("127.0.0.1", "::1"):
            with Client((host, server.port)) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n.")
            self.assertEqual(self.mails[-1].peer.host, host)

    def check_both_families(self, host, addresses):
        """Serve on `host`: it listens on these addresses, and serves IPv4 and IPv6."""
        server = self.serve(host=host)
        self.assertEqual([peer.host for peer in server.addresses], addresses)
        for place in ("127.0.0.1", "::1"):
            with Client((place, server.port)) as client:
                self.assertEqual(client.open()[:3], "250")

    @needs_ipv6
    def test_both_stacks_where_no_socket_is_for_both(self):
        def setsockopt(listener, level, option, value):
            if (level, option) == (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) and not value:
                setsockopt(listener, level, option, 1)
                raise OSError(errno.EINVAL, "as on OpenBSD")
            original(listener, level, option, value)

        original = socket.socket.setsockopt
        with mock.patch.object(socket.socket, "setsockopt", setsockopt):
            self.check_both_families("::", ["::", "0.0.0.0"])

    @needs_ipv6
    def test_several_interfaces_share_a_free_port(self):
        self.check_both_families(("127.0.0.1", "::", "127.0.0.1"), ["127.0.0.1", "::"])
        self.check_both_families(("::", "127.0.0.1"), ["::", "127.0.0.1"])


# The library

def open_descriptors():
    """How many descriptors this process has open."""
    return sum(1 for descriptor in range(256) if is_open(descriptor))


def is_open(descriptor):
    try:
        return bool(os.fstat(descriptor))
    except OSError:
        return False


class LibraryCase(ServerCase):
    """Tests of msmtpd.Server, each of which leaves no thread of a server's."""

    def setUp(self):
        self.threads = _thread._count()
        self.addCleanup(lambda: wait_for(lambda: self.more_threads() <= 0, "all threads to end"))

    def more_threads(self):
        """How many threads there are beyond those that were there before."""
        return _thread._count() - self.threads

    def sender(self, server, mail="x"):
        """A client that has sent a mail, and not yet read the reply."""
        client = self.client(server)
        client.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
        client.send(mail + "\r\n.\r\n")
        return client

    def reply_to(self, deliver, **options):
        """The reply to a mail, and to a NOOP behind it."""
        server = self.serve(deliver, **options)
        client = self.sender(server)
        replies = client.line(), client.do("NOOP")
        server.stop()
        return replies


class StartingAServer(LibraryCase):

    def test_arguments_that_make_no_sense_are_refused_before_it(self):
        with self.assertRaises(TypeError):
            msmtpd.Server(None)
        for options in ({"host": ()}, {"host": ("127.0.0.1", 25)}, {"port": -1}, {"port": 65536},
                        {"port": "25"}, {"authenticate": {"user": "password"}},
                        {"starttls": False}, {"check": "x"}, {"max_size": -1}, {"max_sessions": 0},
                        {"timeout": 0}, {"timeout": float("nan")}, {"log": "name"}):
            with self.subTest(options), self.assertRaisesRegex(ValueError, list(options)[0]):
                msmtpd.Server(print, **options)

    @unittest.skipUnless(ssl, "no module ssl")
    def test_nor_is_a_context_taken_that_no_server_can_use(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = msmtpd.Server(print, tls=context)
        for wrong in True, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "^tls "):
                msmtpd.Server(print, tls=wrong)
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "^tls "):
                server.tls = wrong
        with self.assertRaises(ValueError):
            server.tls = None       # AUTH would be offered in plain text
        self.assertIs(server.tls, context)

    def test_host_and_port_are_known_when_start_returns(self):
        second = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
        for host in ("127.0.0.1", second, tuple({"127.0.0.1", second})):
            with self.subTest(host=host):
                server = msmtpd.Server(print, host)
                server.start()
                self.addCleanup(server.stop)
                hosts = [host] if isinstance(host, str) else list(host)
                self.assertEqual([peer.host for peer in server.addresses], hosts)
                self.assertEqual((server.host, server.port), server.addresses[0])
                for address in server.addresses:
                    self.assertTrue(0 < address.port < 65536)
                    with Client(tuple(address)) as client:
                        self.assertEqual(client.do("NOOP"), "220 localhost ESMTP msmtpd")
                server.stop()

    @needs_ipv6
    def test_a_port_that_only_the_first_host_has_free_is_not_taken(self):
        real, ports = socket.create_server, []

        def create_server(address, **options):
            if len(ports) == 1:
                ports.append(address[1])
                raise OSError(errno.EADDRINUSE, "taken")
            listener = real(address, **options)
            ports.append(listener.getsockname()[1])
            return listener
        with mock.patch.object(socket, "create_server", create_server):
            server = self.serve(host=("127.0.0.1", "::1"))
        self.assertEqual(ports[1], ports[0])
        self.assertNotEqual(ports[2], ports[0])
        self.assertEqual([peer.port for peer in server.addresses], ports[2:])

        def never(address, **options):      # as where one of two is the other, too
            ports.append(address)
            if len(ports) % 2 == 0:
                raise OSError(errno.EADDRINUSE, "taken")
            return real(address, **options)
        ports.clear()
        with mock.patch.object(socket, "create_server", never), self.assertRaises(OSError):
            self.serve(host=("127.0.0.1", "::1"))
        self.assertLess(len(ports), 40)

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

    def test_an_interrupted_start_leaves_nothing(self):
        descriptors, start, left = open_descriptors(), threading.Thread.start, [1] * 5

        def start_five(thread):
            if not left:
                raise KeyboardInterrupt
            left.pop()
            start(thread)
        server = msmtpd.Server(print)
        with mock.patch.object(msmtpd, "_report") as report, \
                mock.patch.object(threading.Thread, "start", start_five), \
                self.assertRaises(KeyboardInterrupt):
            server.start()
        wait_for(lambda: not self.more_threads(), "the threads to end")
        self.assertEqual(open_descriptors(), descriptors)
        report.assert_not_called()

    def test_what_fails_behind_the_listening_leaves_nothing(self):
        descriptors = open_descriptors()
        def fail(*arguments, **options):
            raise RuntimeError("there is none")

        for names in (["socket.socketpair"],
                      ["_thread.start_new_thread", "threading.Thread.start"]):
            with self.subTest(names=names), contextlib.ExitStack() as patched:
                for name in names:
                    patched.enter_context(mock.patch(name, fail))
                kept = None     # as a log may keep it, with all that its traceback holds
                try:
                    msmtpd.Server(print).start()
                except RuntimeError as error:
                    kept = error
                self.assertIsNotNone(kept)
                self.assertEqual(open_descriptors(), descriptors)

    def test_started_once_at_a_time_and_stopped_as_often_as_one_likes(self):
        server = msmtpd.Server(print)
        server.stop()
        for _ in range(2):
            server.start()
            with self.assertRaises(RuntimeError):
                server.start()
            with Client(server) as client:
                self.assertEqual(client.open(), "250-localhost")
            server.stop()
            server.stop()
            with self.assertRaises(OSError):
                socket.create_connection((server.host, server.port), PATIENCE)

    def test_a_block_may_be_entered_with_a_started_server(self):
        server = self.serve()
        with server:
            self.assertEqual(self.client(server).line(), "220 localhost ESMTP msmtpd")
        with self.assertRaises(OSError):
            Client(server)

    def test_a_hundred_starts_and_stops_leave_nothing(self):
        mails, port = [], 0
        for number in range(101):
            with msmtpd.Server(mails.append, port=port) as server:
                port = server.port
                with smtplib.SMTP(server.host, port, "client", PATIENCE) as client:
                    client.sendmail("a@example.org", ["b@example.org"], "x")
            if not number:
                descriptors = open_descriptors()
        self.assertEqual((len(mails), open_descriptors()), (101, descriptors))

    def test_servers_in_parallel_know_nothing_of_each_other(self):
        inboxes = [[] for _ in range(8)]
        servers = [self.serve(inbox.append) for inbox in inboxes]
        clients = [self.sender(server, "mail %d" % n) for n, server in enumerate(servers)]
        self.assertEqual([client.line()[:3] for client in clients], ["250"] * 8)
        self.assertEqual([[mail.data for mail in inbox] for inbox in inboxes],
                         [[b"mail %d\n" % number] for number in range(8)])
        servers[0].stop()
        self.assertEqual(clients[0].line(), "421 4.3.2 Shutting down")
        self.assertEqual(clients[1].do("NOOP"), "250 2.0.0 Here")


class StoppingAServer(LibraryCase):

    def setUp(self):
        super().setUp()
        self.release = threading.Event()
        self.entered = threading.Semaphore(0)
        self.addCleanup(self.release.set)

    def stuck(self, mail):
        """A deliver that does not return before self.release."""
        self.entered.release()
        self.release.wait(PATIENCE)

    def stop_in_time(self, server):
        """Stop a server, and see that it comes to an end."""
        stopping = threading.Thread(target=server.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        self.assertFalse(stopping.is_alive())

    def test_within_two_seconds_whatever_clients_do(self):
        server = self.serve(self.stuck)
        new, idle, data, mute = (self.client(server) for _ in range(4))
        idle.open("MAIL FROM:<a@example.org>")
        for client in (data, mute):
            client.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
        mute.send("x" * 100)
        stuck = self.sender(server)
        self.assertTrue(self.entered.acquire(timeout=PATIENCE))
        began, ended = time.monotonic(), {}
        with self.assertLogs("msmtpd", "ERROR") as log:
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            for name, client in (("new", new), ("idle", idle)):
                self.assertEqual(client.rest().splitlines()[-1:], ["421 4.3.2 Shutting down"])
                ended[name] = time.monotonic() - began
            data.send("hi\r\n.\r\n")        # still in time, and as stuck as the other
            self.assertTrue(self.entered.acquire(timeout=PATIENCE))
            self.assertEqual(mute.line(), "421 4.3.2 Shutting down")
            ended["mute"] = time.monotonic() - began
            stopping.join(PATIENCE)
        self.assertLess(time.monotonic() - began, 2)
        self.assertLess(max(ended["new"], ended["idle"]), 0.9)
        self.assertGreater(ended["mute"], 0.9)
        self.assertEqual(len(log.output), 1, log.output)
        self.assertIn("left behind: 2 sessions", log.output[0])
        self.assertEqual(self.more_threads(), 2)
        self.release.set()
        for client in (stuck, data):
            self.assertEqual(client.line(), "250 2.0.0 Delivered")

    def test_clients_that_never_pause(self):
        for begin, line, grace, seconds in (
                ((), "NOOP", 30.0, 0.0),
                (("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA"), "x" * 98, 0.5, 0.5)):
            server = self.serve()
            client = self.client(server)
            client.open(*begin)

            def talk(client=client, line=line):
                with contextlib.suppress(ConnectionError):
                    while True:
                        client.send((line + "\r\n") * 10000)

            def listen(client=client):
                with contextlib.suppress(ConnectionError):
                    while client.line():
                        pass
            talking = [threading.Thread(target=talk), threading.Thread(target=listen)]
            for thread in talking:
                thread.start()
            began = time.monotonic()
            server.stop(grace=grace, patience=PATIENCE)
            took = time.monotonic() - began
            for thread in talking:
                thread.join(PATIENCE)
                self.assertFalse(thread.is_alive())
            self.assertTrue(seconds <= took < seconds + 5, took)

    def test_a_further_drain_shortens_the_grace(self):
        server = self.serve()
        client = self.client(server)
        client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
        server.drain(30.0, 30.0)
        client.send("x\r\n")      # still heard
        wait_for(lambda: session_waits(1), "the session to wait for its client alone")
        began = time.monotonic()
        server.stop(0.3, 1.0)
        self.assertEqual(client.rest(), "421 4.3.2 Shutting down\r\n")
        self.assertLess(time.monotonic() - began, 1.2)
        self.assertEqual(self.more_threads(), 0)

    def test_a_further_drain_lengthens_nothing(self):
        server = self.serve(self.stuck)
        self.sender(server)
        self.assertTrue(self.entered.acquire(timeout=PATIENCE))
        client = self.client(server)
        client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
        server.drain(0.2, 0.2)
        began = time.monotonic()
        with self.assertLogs("msmtpd", "ERROR"):
            server.stop(PATIENCE, PATIENCE)
        self.assertEqual(client.rest(), "421 4.3.2 Shutting down\r\n")
        self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_grace_is_for_those_who_send(self):
        server = self.serve(timeout=0.3)
        client = self.client(server)
        client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
        server.drain(PATIENCE, PATIENCE)
        began = time.monotonic()
        self.assertEqual(client.rest()[:9], "421 4.4.2")
        self.assertLess(time.monotonic() - began, PATIENCE / 2)

    def test_clients_that_wait_for_a_place_or_linger(self):
        server = self.serve(max_sessions=1)
        client = self.client(server)
        client.open()       # and so takes the only one
        wait_for(session_waits, "the session to wait")
        server.stop()
        self.assertEqual(client.rest(), "421 4.3.2 Shutting down\r\n")
        server = self.serve()
        self.freeze()       # without which a farewell is for a second
        client = self.client(server)
        client.send("FROB\r\n" * 10)
        self.assertEqual(client.rest()[-27:], "421 4.7.0 Too many errors\r\n")
        wait_for(session_waits, "the session to linger")
        self.stop_in_time(server)

    def test_a_client_whom_another_process_was_faster_to_accept(self):
        server, taken = self.serve(), []
        (number, real), = server._workers._listeners._sockets.items()

        class Listener:
            close = real.close

            def accept(self):
                if not taken:
                    taken.append(real.accept()[0])
                return real.accept()
        server._workers._listeners._sockets[number] = Listener()

        def wake():
            with contextlib.suppress(OSError):
                Client(server).close()
        self.addCleanup(wake)       # whoever waits in accept in spite of all
        self.client(server)
        wait_for(lambda: taken, "the other to accept")
        self.stop_in_time(server)
        taken[0].close()

    def test_a_thread_that_waits_for_a_client_when_the_listeners_are_closed(self):
        server = self.serve()
        workers = server._workers
        server.stop()
        with mock.patch.object(msmtpd, "_report") as report:
            workers._work(0)
        report.assert_not_called()

    def test_a_thread_can_be_seen_before_it_looks_whether_to_accept(self):
        """Or else the end of those that accept would not be waited for."""
        server, seen = self.serve(), []
        workers = server._workers
        server.stop()

        class Stopped:
            @property
            def drain_until(self):
                seen.append(set(workers._waiting))
                return 0.0
        workers._slots = Stopped()
        workers._work(0)
        self.assertEqual((seen, workers._waiting), ([{0}], set()))

    def test_no_listener_is_closed_in_the_middle_of_an_accept(self):
        server = self.serve()
        (number, real), = server._workers._listeners._sockets.items()
        entered, release, closed = threading.Event(), threading.Event(), []

        class Listener:
            def accept(self):
                entered.set()
                release.wait(PATIENCE)
                return real.accept()

            def close(self):
                closed.append(release.is_set())
                real.close()
        server._workers._listeners._sockets[number] = Listener()
        self.client(server)
        self.assertTrue(entered.wait(PATIENCE))
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(0.1)
        release.set()
        stopping.join(PATIENCE)
        self.assertEqual(closed, [True])

    def test_sockets_that_wait_by_themselves_for_too_long_or_not_at_all(self):
        """Clients are served and told, whatever the defaults and the system's abilities."""
        def refuse(listener, level, option, value):
            if level == socket.SOL_SOCKET and option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                raise OSError(errno.ENOPROTOOPT, "no such option")
            real(listener, level, option, value)
        real = socket.socket.setsockopt
        for name, default, order, setsockopt in (
                ("default timeout", 60.0, sys.byteorder, real), ("no timeouts", None, "big", real),
                ("no such options", None, sys.byteorder, refuse)):
            with self.subTest(name), mock.patch.object(sys, "byteorder", order), \
                    mock.patch.object(socket.socket, "setsockopt", setsockopt):
                self.addCleanup(socket.setdefaulttimeout, None)
                socket.setdefaulttimeout(default)
                server = self.serve()
                client = self.client(server)
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                self.assertEqual(client.do("x\r\n.")[:3], "250")
                began = time.monotonic()
                server.stop()
                self.assertEqual(client.rest(), "421 4.3.2 Shutting down\r\n")
                self.assertLess(time.monotonic() - began, 1.4)

    def test_grace_and_patience_are_seconds(self):
        server = self.serve(self.stuck)
        self.client(server).open()
        self.sender(server)
        self.assertTrue(self.entered.acquire(timeout=PATIENCE))
        server.drain(30, 30)                # which stop then cuts short
        began = time.monotonic()
        with self.assertLogs("msmtpd", "ERROR"):
            server.stop(0, 0.1)
        self.assertLess(time.monotonic() - began, 1)

    def test_a_mail_that_ends_in_time_is_delivered(self):
        server = self.serve()
        client = self.client(server)
        client.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
        server.drain(PATIENCE, PATIENCE)
        client.send("hi\r\n.\r\n")
        self.assertEqual(client.rest().splitlines(),
                         ["250 2.0.0 Delivered", "421 4.3.2 Shutting down"])
        server.stop()
        self.assertEqual([mail.data for mail in self.mails], [b"hi\n"])

    def test_inside_deliver_it_waits_for_nobody_and_outside_for_deliver(self):
        mails, both, stopped = [], threading.Barrier(2), threading.Event()

        def deliver(mail):
            both.wait(PATIENCE)
            began = time.monotonic()
            server.stop(PATIENCE, PATIENCE)
            self.assertLess(time.monotonic() - began, 1)
            with self.assertRaises(OSError):
                socket.create_connection((server.host, server.port), PATIENCE)
            stopped.set()
            time.sleep(0.2)                 # the work that is left to do
            mails.append(mail)

        for way in ("stop", "serve_forever"):
            with self.subTest(way=way):
                server = self.serve(deliver)
                clients = [self.sender(server), self.sender(server)]
                self.assertTrue(stopped.wait(PATIENCE))
                waiting = threading.Thread(target=getattr(server, way), daemon=True)
                waiting.start()
                waiting.join(PATIENCE)
                self.assertFalse(waiting.is_alive())
                self.assertEqual(len(mails), 2)
                for client in clients:
                    self.assertEqual(client.line(), "250 2.0.0 Delivered")
                del mails[:]
                stopped.clear()

    def test_inside_deliver_it_may_be_followed_by_a_start(self):
        restarted = threading.Event()

        def deliver(mail):
            server.stop()
            server.start()
            restarted.set()

        server = self.serve(deliver)
        client = self.sender(server)
        self.assertTrue(restarted.wait(PATIENCE))
        self.assertEqual(client.line(), "250 2.0.0 Delivered")
        for client in [self.client(server) for _ in range(3)]:
            self.assertEqual(client.line(), "220 localhost ESMTP msmtpd")

    def test_inside_deliver_it_may_be_followed_by_a_start_whoever_waits_for_its_end(self):
        """What waits ends with what it waited for, and neither ends nor forgets the new start."""
        def deliver(mail):
            self.entered.release()
            self.release.wait(PATIENCE)
            server.stop()
            server.start()
            started.set()

        started = threading.Event()
        for way in ("serve_forever", "stop"):
            with self.subTest(way=way):
                self.release.clear()
                started.clear()
                server = self.serve(deliver, max_sessions=1)
                self.sender(server)
                self.assertTrue(self.entered.acquire(timeout=PATIENCE))
                waiting = threading.Thread(
                    target=getattr(server, way), daemon=True,
                    args=(PATIENCE, PATIENCE) if way == "stop"
                    else (lambda: started.wait(PATIENCE),))
                waiting.start()
                wait_for(lambda server=server: server._forever
                         or server._slots.drain_until is not None, "it to wait")
                self.release.set()
                waiting.join(PATIENCE)
                self.assertFalse(waiting.is_alive())
                for _ in range(2):
                    with Client(server) as client:
                        self.assertEqual(client.open("QUIT")[:3], "221")
                server.stop()
                with self.assertRaises(OSError):
                    Client(server)

    def test_inside_deliver_it_may_be_followed_by_a_block(self):
        server = self.serve(lambda mail: server.stop())
        self.assertEqual(self.sender(server).line(), "250 2.0.0 Delivered")
        with server:
            self.assertEqual(self.client(server).line(), "220 localhost ESMTP msmtpd")

    def test_one_that_was_left_behind_does_not_disturb_the_next_start_and_leaves_nothing(self):
        descriptors, server = open_descriptors(), self.serve(self.stuck)
        clients = [self.sender(server)]
        self.assertTrue(self.entered.acquire(timeout=PATIENCE))
        with self.assertLogs("msmtpd", "ERROR"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            server.stop(0, 0)
            server.start()
            self.release.set()
            clients += [self.client(server) for _ in range(4)]
            for client in clients[1:]:
                self.assertEqual(client.line(), "220 localhost ESMTP msmtpd")
            server.stop()
            wait_for(lambda: not self.more_threads(), "the old thread to end")
            for client in clients:
                client.close()
            gc.collect()
        self.assertEqual([str(each.message) for each in caught], [])
        self.assertEqual(open_descriptors(), descriptors)

    def test_serve_forever_starts_where_needed_and_returns_when_stopped(self):
        for started in (False, True):
            with self.subTest(started=started):
                server = msmtpd.Server(print)
                if started:
                    server.start()
                stopping = []
                serving = threading.Thread(target=server.serve_forever, daemon=True,
                                           args=(lambda: stopping.append(1),))
                serving.start()
                wait_for(lambda: server.port, "the server to listen")
                client = self.client(server)
                self.assertEqual(client.line(), "220 localhost ESMTP msmtpd")
                self.assertTrue(serving.is_alive())
                self.assertEqual(stopping, [])
                server.stop()
                serving.join(PATIENCE)
                self.assertEqual((serving.is_alive(), stopping), (False, [1]))

    def test_serve_forever_returns_where_a_stop_was_as_quick(self):
        class StoppedAtOnce(msmtpd.Server):
            def start(self):
                super().start()
                self.stop()
                starts.append(1)
        starts, server = [], StoppedAtOnce(print)
        server.serve_forever()
        server.serve_forever()      # which starts it again
        self.assertEqual(len(starts), 2)

    def test_a_signal_handler_may_begin_it(self):
        server = self.serve()
        client = self.client(server)
        client.line()
        before = signal.signal(signal.SIGALRM, lambda number, frame: server.drain(0, 0.1))
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)      # should the other not do
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        began, main = time.monotonic(), threading.get_ident()

        def interrupt():
            wait_for(lambda: sys._current_frames()[main].f_code.co_name == "wait", "the wait")
            # The kernel may give a signal to any thread, where it interrupts nothing.
            others = set(sys._current_frames()) - {main, threading.get_ident()}
            signal.pthread_kill(others.pop(), signal.SIGALRM)
        threading.Thread(target=interrupt).start()
        server.serve_forever()
        self.assertLess(time.monotonic() - began, PATIENCE - 1)
        self.assertEqual(client.line(), "421 4.3.2 Shutting down")
        self.assertEqual(signal.set_wakeup_fd(-1), -1)

    def test_from_several_threads_at_once(self):
        server = self.serve(self.stuck)
        client = self.client(server)
        client.line()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(server.stop) for _ in range(4)]:
                self.assertIsNone(future.result(PATIENCE))
        self.assertEqual(client.line(), "421 4.3.2 Shutting down")
        server.start()
        self.assertEqual(self.client(server).line(), "220 localhost ESMTP msmtpd")


class WhileAMailIsDelivered(LibraryCase):
    """What clients do meanwhile is looked at behind it, where it took a while."""

    def setUp(self):
        super().setUp()
        self.entered, self.go = threading.Event(), threading.Event()
        self.addCleanup(self.go.set)

    def deliver(self, mail):
        """Return when self.go is set, which is a second later by a clock that stands still."""
        self.entered.set()
        self.go.wait(PATIENCE)
        self.freeze(1)
        self.mails.append(mail)

    def test_the_log_says_that_they_left(self):
        for way in "close", "reset":
            with self.subTest(way), self.assertLogs("msmtpd", "INFO") as log:
                server = self.serve(self.deliver)
                getattr(self.sender(server), way)()
                self.go.set()
                wait_for(lambda: "closed: " in "".join(log.output), "the end of the session")
                self.assertEqual(len(self.mails), 1)
                self.go.clear()
            self.assertIn("the client left before the reply", "".join(log.output))
            self.assertIn("status=sent", "".join(log.output))

    def test_who_has_said_all_has_not_left(self):
        with self.assertLogs("msmtpd", "INFO") as log:
            client = self.sender(self.serve(self.deliver), "x\r\n.\r\nQUIT\r\nNOOP")
            client.socket.shutdown(socket.SHUT_WR)
            self.go.set()
            self.assertEqual(client.rest().splitlines()[-1][:3], "221")
            wait_for(lambda: "closed: " in "".join(log.output), "the end of the session")
        self.assertNotIn("before the reply", "".join(log.output))

    def test_what_they_say_is_not_lost(self):
        def pull(wire, *arguments, **options):
            if failures:
                raise failures.pop()
            return real(wire, *arguments, **options)
        real, failures = msmtpd.Wire._pull, []
        for errors in [], [MemoryError()]:
            with self.subTest(errors), mock.patch.object(msmtpd.Wire, "_pull", pull):
                client = self.sender(self.serve(self.deliver))
                self.assertTrue(self.entered.wait(PATIENCE))
                failures += errors      # when they are looked at
                client.send("NOOP\r\nVRFY a\r\n")
                self.go.set()
                self.assertEqual([client.line()[:3] for _ in range(3)], ["250", "250", "252"])
                self.assertEqual(failures, [])
                self.entered.clear()
                self.go.clear()

    def test_the_reply_does_not_wait_for_them(self):
        self.go.set()
        self.assertEqual(self.sender(self.serve(self.deliver)).line(), "250 2.0.0 Delivered")


PYTEST = """
import smtplib
import pytest
import msmtpd

@pytest.fixture
def inbox():
    mails = []
    with msmtpd.Server(deliver=mails.append) as server:
        server.mails = mails
        yield server

@pytest.mark.parametrize("number", range(3))
def test_mail(inbox, number):
    with smtplib.SMTP(inbox.host, inbox.port) as client:
        client.sendmail("a@example.org", ["b@example.org"], "mail %d" % number)
    assert [mail.data for mail in inbox.mails] == [b"mail %d\\n" % number]
"""


class WhereItIsEmbedded(LibraryCase):

    def test_in_setUp_and_tearDown(self):
        class Embedding(unittest.TestCase):
            def setUp(self):
                self.mails = []
                self.server = msmtpd.Server(self.mails.append)
                self.server.start()

            def tearDown(self):
                self.server.stop()

            def test_mail(self):
                with smtplib.SMTP(self.server.host, self.server.port) as client:
                    client.sendmail("a@example.org", ["b@example.org"], "x")
                self.assertEqual(len(self.mails), 1)

        result = unittest.TestResult()
        unittest.TestSuite(Embedding("test_mail") for _ in range(5)).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (5, [], []))

    def test_in_a_pytest_fixture(self):
        try:
            importlib.import_module("pytest")
        except ImportError:
            self.skipTest("no pytest")
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "test_it.py"), "w", encoding="utf-8") as file:
                file.write(PYTEST)
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error",
                 folder], env=dict(os.environ, PYTHONPATH=os.path.dirname(msmtpd.__file__)),
                cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        self.assertIn(b"3 passed", done.stdout)

    def test_beside_an_event_loop(self):
        mails = []

        def send():
            with smtplib.SMTP(server.host, server.port) as client:
                client.sendmail("a@example.org", ["b@example.org"], "x")

        async def handle(mail):
            mails.append((mail, threading.current_thread()))

        async def run():
            nonlocal server
            loop = asyncio.get_running_loop()

            def deliver(mail):      # in the session's thread, which waits for the coroutine
                asyncio.run_coroutine_threadsafe(handle(mail), loop).result(PATIENCE)
            server = msmtpd.Server(deliver)
            await loop.run_in_executor(None, server.start)
            await asyncio.gather(*(loop.run_in_executor(None, send) for _ in range(3)))
            await loop.run_in_executor(None, server.stop)

        server = None
        asyncio.run(run())
        self.assertEqual([thread for _, thread in mails], [threading.current_thread()] * 3)

    def test_deliver_is_called_from_several_threads_at_a_time(self):
        together = threading.Barrier(5)
        threads = []

        def deliver(mail):
            together.wait(PATIENCE)     # broken unless all of them are here
            threads.append(threading.get_ident())

        server = self.serve(deliver)
        clients = [self.sender(server) for _ in range(5)]
        self.assertEqual([client.line() for client in clients], ["250 2.0.0 Delivered"] * 5)
        self.assertEqual(len(set(threads) - {threading.get_ident()}), 5)

    def test_its_threads_are_known_to_threading(self):
        # Debuggers and coverage set their hooks so, and test suites look there for what was left.
        traced, names = set(), []
        self.addCleanup(threading.settrace, getattr(threading, "_trace_hook", None))
        threading.settrace(lambda frame, event, value: traced.add(frame.f_code))
        before = threading.active_count()

        def deliver(mail):
            names.append(threading.current_thread().name)

        self.reply_to(deliver)
        self.assertIn(deliver.__code__, traced)
        self.assertRegex(names[0], "^msmtpd")
        wait_for(lambda: threading.active_count() <= before, "the thread to be gone")

    def test_a_mail_is_in_the_list_before_its_client_knows(self):
        server = self.serve()
        with smtplib.SMTP(server.host, server.port) as client:
            for number in range(1, 200):
                client.sendmail("a@example.org", ["b@example.org"], "x")
                self.assertEqual(len(self.mails), number)


# What a program of somebody else's does with the library; argument: the module's name.
SELFTEST = """
import importlib, smtplib, sys
msmtpd = importlib.import_module(sys.argv[1])
def must(condition):
    if not condition:
        raise SystemExit("line %d of the script" % sys._getframe(1).f_lineno)
def deliver(mail):
    if "nobody@" in mail.recipients[0]:
        raise msmtpd.PermanentFailure("no", 550, "5.1.1")
    if "trouble@" in mail.recipients[0]:
        raise ArithmeticError
    mails.append(mail)
mails = []
with msmtpd.Server(deliver, authenticate=lambda user, password: password == "se") as server:
    with smtplib.SMTP(server.host, server.port, "client", 20) as client:
        client.login("user", "se")
        for number in 4, 1 << 20:
            client.sendmail("a@example.org", ["b@example.org"], b"x\\r\\n" * number)
        for name, code in ("nobody", 550), ("trouble", 451):
            try:
                client.sendmail("a@example.org", [name + "@example.org"], "x")
            except smtplib.SMTPDataError as error:
                must(error.smtp_code == code)
            else:
                must(False)
must([len(mail.data) for mail in mails] == [8, 2 << 20])
must(mails[0].message.get_payload() == "x\\n" * 4 and mails[1].user == "user")
del mails[:]
print("fine")
"""

# Takes from the standard library what Windows' has not, and makes the rest do what it does there.
WINDOWS = """
import argparse, contextlib, errno, email, email.message, email.parser, email.policy, logging
import os, select, shutil, signal, socket, stat, subprocess, sys, tempfile, threading, traceback
tempfile.gettempdir()
for name in "ssl syslog pwd grp fcntl resource termios tty pty posix".split():
    sys.modules[name] = None
for module, names in {
        os: "chown fchmod fork forkpty get_blocking getuid geteuid getpgid killpg mkfifo openpty "
            "pidfd_open posix_spawn setsid set_blocking uname wait4 WNOHANG WIFSIGNALED "
            "WTERMSIG WEXITSTATUS",
        select: "poll epoll kqueue devpoll",
        signal: "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGUSR1 pthread_sigmask setitimer",
        socket: "AF_UNIX SO_REUSEPORT MSG_DONTWAIT"}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
def no_descriptor(*arguments):
    raise AssertionError("a socket is no file descriptor")
os.read = os.write = os.dup = os.dup2 = os.pipe = no_descriptor
def sockets_only(readers, writers, errors, seconds=None, select=select.select, fstat=os.fstat):
    must(readers or writers)
    must(all(stat.S_ISSOCK(fstat(d).st_mode) for d in (*readers, *writers)))
    return select(readers, writers, errors, seconds)
select.select = sockets_only
def socketpair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]
socket.socketpair = socketpair
del socket.SO_REUSEADDR     # which lets others take the port there
tempfile.TemporaryFile, os.O_TEMPORARY = tempfile.NamedTemporaryFile, 0
os.name, sys.platform = "nt", "win32"
""" + SELFTEST + """
server = msmtpd.Server(print)
server.start()
main = threading.get_ident()
def stop():
    while sys._current_frames()[main].f_code.co_name != "sockets_only":
        pass
    server.stop()
threading.Thread(target=stop).start()
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
            logging.root.handlers[:], logging.root.level, logging.root.disabled,
            logging.raiseExceptions, logging.lastResort, logging.getLoggerClass(),
            logging.getLogger("msmtpd").level, logging.getLogger("msmtpd").propagate,
            logging.getLogger("msmtpd").disabled, locale.setlocale(locale.LC_ALL),
            dict(os.environ), os.getcwd(), os.umask(0o22), socket.getdefaulttimeout(),
            threading.excepthook, threading.stack_size(), sys.excepthook, sys.unraisablehook,
            sys.getswitchinterval(), sys.getrecursionlimit(), sys.path[:], sys.stdout, sys.stderr,
            gc.isenabled(), gc.get_threshold(), warnings.filters[:], sys.flags]
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
def is_served():
    with smtplib.SMTP(server.host, server.port, timeout=5) as client:
        return client.noop()[0] == 250
assert is_served()
stops = os.fork()
if not stops:
    server.stop()
    os._exit(0)
assert os.waitpid(stops, 0)[1] == 0
assert is_served()
used = time.process_time()
time.sleep(0.4)
assert time.process_time() - used < 0.2     # or else its threads spin
sleeps = os.fork()
if not sleeps:
    time.sleep(60)
    os._exit(0)
assert is_served()
began = time.monotonic()
server.stop(grace=60, patience=60)
assert time.monotonic() - began < 5
os.kill(sleeps, signal.SIGKILL)
print("fine")
"""


class WhereItIsVendored(unittest.TestCase):
    """The same script in other surroundings, each in a process of its own."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="msmtpd-test-")
        self.addCleanup(shutil.rmtree, self.folder)

    def run_script(self, script, *options, path=os.path.dirname(msmtpd.__file__), name="msmtpd"):
        environment = dict(os.environ, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
        environment.pop("PYTHONWARNINGS", None)
        done = subprocess.run([sys.executable, *options, "-c", script, name], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE,
                              cwd=self.folder)
        self.assertEqual((done.stdout.decode(), done.returncode), ("fine\n", 0))

    def test_in_a_package_under_another_name(self):
        package = os.path.join(self.folder, "project", "vendor")
        os.makedirs(package)
        shutil.copy(msmtpd.__file__, os.path.join(package, "postbox.py"))
        self.run_script(SELFTEST, path=self.folder, name="project.vendor.postbox")

    def test_from_a_zip_file(self):
        path = os.path.join(self.folder, "library.zip")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(msmtpd.__file__, os.path.basename(msmtpd.__file__))
        self.run_script(SELFTEST + "must('.zip' in msmtpd.__file__)", path=path)

    def test_without_assertions_and_docstrings(self):
        self.run_script(SELFTEST + "must(msmtpd.__doc__ is None)", "-OO")

    def test_with_warnings_as_errors(self):
        self.run_script(SELFTEST + "import gc; gc.collect()", "-W", "error", "-bb", "-X", "dev")

    def test_on_what_windows_has(self):
        self.run_script(WINDOWS)

    def test_in_a_process_that_forks(self):
        self.run_script(FORK)
        self.run_script("import select\nvars(select).pop('epoll', None)\n" + FORK)

    def test_in_a_process_whose_state_stays_as_it_was(self):
        self.run_script(STATE)

    def test_an_import_loads_nothing_that_is_not_needed_at_once(self):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", "-c", "import sys; sys.path.append(sys.argv[1])\n"
             "import msmtpd\nprint(*sys.modules)", os.path.dirname(msmtpd.__file__)],
            stdout=subprocess.PIPE, timeout=PATIENCE, check=True)
        loaded = set(done.stdout.decode().split())
        self.assertIn("msmtpd", loaded)
        self.assertEqual(loaded & set(
            "argparse asyncio base64 copy ctypes dataclasses difflib email fcntl getpass hmac "
            "inspect keyring logging pwd resource selectors shlex shutil socket socketserver ssl "
            "subprocess syslog tempfile threading traceback typing".split()), set())

    def test_what_is_public_is_there_and_has_a_docstring(self):
        for name in msmtpd.__all__:
            with self.subTest(name=name):
                value = getattr(msmtpd, name)
                self.assertTrue(value.__doc__)
                members = vars(value).items() if isinstance(value, type) else ()
                self.assertEqual([member for member, function in members
                                  if isinstance(function, (types.FunctionType, property))
                                  and member[0] != "_" and not function.__doc__], [])


class WhatTheDocumentationShows(LibraryCase):

    def test_the_examples_in_docstrings(self):
        result = doctest.testmod(msmtpd)
        self.assertGreaterEqual(result.attempted, 3)
        self.assertEqual(result.failed, 0)

    def test_the_example_that_the_module_begins_with(self):
        block = re.search(r"(?m)^    import smtplib.*\n(    .*\n)+", msmtpd.__doc__).group()
        output = io.StringIO()
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)    # the client is not closed
            exec(textwrap.dedent(block), {})
        self.assertEqual(output.getvalue(), "a@example.org ['b@example.org'] b'Hi\\n'\n")

    def test_moving_over_from_smtpd(self):
        class Inbox:
            def process_message(self, peer, mailfrom, rcpttos, data, **options):
                seen.append((peer, mailfrom, rcpttos, data, options))
                return "550 Not me" if "nobody@example.org" in rcpttos else None

        seen = []
        with msmtpd.Server(msmtpd.smtpd_handler(Inbox().process_message)) as server:
            with smtplib.SMTP(server.host, server.port, "client") as client:
                client.sendmail("a@example.org", ["b@example.org"], "Subject: hi\n\n.dot\n")
                with self.assertRaises(smtplib.SMTPDataError) as caught:
                    client.sendmail("a@example.org", ["nobody@example.org"], b"x")
                port = client.sock.getsockname()[1]
        self.assertEqual((caught.exception.smtp_code, caught.exception.smtp_error),
                         (550, b"5.3.0 Not me"))
        self.assertEqual(seen[0], (("127.0.0.1", port), "a@example.org", ["b@example.org"],
                                   b"Subject: hi\n\n.dot", {"mail_options": seen[0][4].get(
                                       "mail_options"), "rcpt_options": []}))

    def test_moving_over_from_aiosmtpd(self):
        def check(address, mail):                       # was handle_MAIL and handle_RCPT
            if address.endswith("@elsewhere.example"):
                raise msmtpd.PermanentFailure("not relayed", 550, "5.7.1")

        def deliver(mail):                              # was handle_DATA
            if b"spam" in mail.data:
                raise msmtpd.PermanentFailure("Message refused", 554, "5.7.1")
            seen.append((mail.sender, mail.recipients, mail.message["Subject"]))

        seen = []
        with msmtpd.Server(deliver, check=check) as server:
            with smtplib.SMTP(server.host, server.port, "client") as client:
                refused = client.sendmail("a@example.org",
                                          ["b@example.org", "c@elsewhere.example"],
                                          "Subject: hi\n\nhi")
                with self.assertRaises(smtplib.SMTPDataError) as caught:
                    client.sendmail("a@example.org", ["b@example.org"], "spam")
        self.assertEqual(refused, {"c@elsewhere.example": (550, b"5.7.1 not relayed")})
        self.assertEqual(caught.exception.smtp_error, b"5.7.1 Message refused")
        self.assertEqual(seen, [("a@example.org", ["b@example.org"], "hi")])


class SmtpdHandlers(LibraryCase):

    def test_replies_that_process_message_may_return(self):
        for text, reply in (
                (None, "250 2.0.0 Delivered"), ("", "250 2.0.0 Delivered"),
                ("250 Ok", "250 2.0.0 Delivered"), ("451 later", "451 4.3.0 later"),
                ("550", "550 5.3.0 Delivery failed"), ("550 5.1.1 no", "550 5.1.1 no"),
                ("452 4.2.2  full", "452 4.2.2 full"), ("550 5 lines", "550 5.3.0 5 lines"),
                ("550-No\r\n550 Never", "550 5.3.0 No Never"),
                ("451-4.2.1 a\n451 b\r\n", "451 4.2.1 a b")):
            with self.subTest(text=text):
                handler = msmtpd.smtpd_handler(lambda *arguments, **options: text)
                self.assertEqual(self.reply_to(handler), (reply, "250 2.0.0 Here"))

    def test_data_as_smtpd_gave_it(self):
        for decode, data, options in ((False, "\u20ac".encode() + b"\n.\n", True),
                                      (True, "\u20ac\n.\n", False)):
            with self.subTest(decode_data=decode):
                seen = []

                def process_message(*arguments, **keywords):
                    seen.append((arguments[1:], bool(keywords)))
                server = self.serve(msmtpd.smtpd_handler(process_message, decode_data=decode))
                client = self.sender(server, "\u20ac\r\n..\r\n")
                self.assertEqual(client.line(), "250 2.0.0 Delivered")
                self.assertEqual(seen, [(("a@example.org", ["b@example.org"], data), options)])
                server.stop()


class FailuresOfDeliver(LibraryCase):

    def test_codes_that_do_not_fit_are_refused_where_they_are_raised(self):
        for failure, good, bad in ((msmtpd.TemporaryFailure, (400, 450, 499, None),
                                    (399, 500, 550, 250, 45, 4500, -450, "450", 450.5, True)),
                                   (msmtpd.PermanentFailure, (500, 554, 599, None),
                                    (499, 600, 450, 55, "550", 550.5, False))):
            for code in good:
                self.assertEqual(failure("x", code).code, code)
            for code in bad:
                with self.subTest(failure=failure, code=code), self.assertRaises(ValueError):
                    failure("x", code)
            digit = "5" if failure is msmtpd.PermanentFailure else "4"
            other = "9" if digit == "4" else "4"
            self.assertEqual(failure("x", enhanced=digit + ".1.20").enhanced, digit + ".1.20")
            for enhanced in ("", other + ".1.1", digit + ".1", digit + ".1.1.1", digit + ".1.1000",
                             digit + ".1.1\n", " " + digit + ".1.1", digit + ".\u0663.0"):
                with self.subTest(failure=failure, enhanced=enhanced):
                    with self.assertRaises(ValueError):
                        failure("x", enhanced=enhanced)

    def test_what_the_client_is_told(self):
        temporary, permanent = msmtpd.TemporaryFailure, msmtpd.PermanentFailure
        for error, reply in (
                (temporary(), "451 4.3.0 Delivery failed"), (temporary("later"), "451 4.3.0 later"),
                (temporary("x", 450), "450 4.3.0 x"), (temporary("x", 452, "4.2.2"), "452 4.2.2 x"),
                (permanent(), "554 5.3.0 Delivery failed"), (permanent("no"), "554 5.3.0 no"),
                (permanent("x", enhanced="5.7.1"), "554 5.7.1 x"),
                (permanent("two\r\nlines\0\u20ac"), "554 5.3.0 two  lines??")):
            with self.subTest(error=repr(error)):
                deliver = mock.Mock(side_effect=error, spec=())
                self.assertEqual(self.reply_to(deliver), (reply, "250 2.0.0 Here"))

    def test_any_other_exception_is_logged_and_its_text_kept_from_the_client(self):
        for error in (RuntimeError("secret"), SystemExit("secret"), MemoryError("secret"),
                      KeyboardInterrupt("secret"), GeneratorExit("secret"),
                      asyncio.CancelledError("secret")):
            with self.subTest(error=repr(error)), self.assertLogs("msmtpd", "ERROR") as log:
                deliver = mock.Mock(side_effect=error, spec=())
                self.assertEqual(self.reply_to(deliver, max_sessions=1),
                                 ("451 4.3.0 Internal error", "250 2.0.0 Here"))
            self.assertEqual(len(log.records), 1)
            self.assertIn("Traceback", log.output[0])
            self.assertIn("secret", log.output[0])

    def test_what_was_meant_to_refuse_but_is_returned_is_no_success(self):
        """As aiosmtpd has it."""
        for result in ("550 5.1.1 no", "451 later", False):
            with self.subTest(result), self.assertLogs("msmtpd", "ERROR") as log:
                self.assertEqual(self.reply_to(lambda mail: result)[0], "451 4.3.0 Internal error")
            self.assertIn("to refuse, raise", log.output[0])
        for result in (None, "250 OK", "4", 0, True):
            with self.subTest(result):
                self.assertEqual(self.reply_to(lambda mail: result)[0], "250 2.0.0 Delivered")

    def test_one_that_is_kept_keeps_no_descriptor_open(self):
        descriptors, error = open_descriptors(), ArithmeticError()
        server = self.serve(mock.Mock(side_effect=error, spec=()))
        client = self.sender(server)
        self.assertEqual(client.line(), "451 4.3.0 Internal error")
        client.close()
        server.stop()
        self.assertIsNotNone(error.__traceback__)   # which holds the session
        self.assertEqual(open_descriptors(), descriptors)

    def test_the_server_outlives_any_of_them(self):
        server = self.serve(mock.Mock(side_effect=asyncio.CancelledError, spec=()))
        with self.assertLogs("msmtpd", "ERROR"):
            for _ in range(3):
                client = self.sender(server)
                self.assertEqual(client.line(), "451 4.3.0 Internal error")
                client.close()

    def test_they_are_no_errors_of_the_client(self):
        failure = msmtpd.PermanentFailure("no valid recipients", 554, "5.5.1")
        for name in ("deliver", "check"):
            with self.subTest(name=name):
                options = {"deliver": print, name: mock.Mock(side_effect=failure, spec=())}
                server = self.serve(**options)
                client = self.client(server)
                client.open()
                for _ in range(msmtpd.MAX_ERRORS + 2):
                    if name == "deliver":
                        client.do("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
                        client.send("x\r\n.\r\n")
                    else:
                        client.send("MAIL FROM:<a@example.org>\r\n")
                    self.assertEqual(client.line(), "554 5.5.1 no valid recipients")
                server.stop()

    def test_421_ends_the_session(self):
        server = self.serve(mock.Mock(side_effect=msmtpd.TemporaryFailure("bye", 421), spec=()))
        self.assertEqual(self.sender(server).rest(), "421 4.3.0 bye\r\n")


class ChecksOfAddresses(LibraryCase):

    def test_are_asked_for_each_sender_and_recipient(self):
        asked = []

        def check(address, mail):
            asked.append((address, mail.sender, list(mail.recipients), mail.helo))
        server = self.serve(check=check)
        client = self.client(server)
        client.open("MAIL FROM:<>", "RCPT TO:<b@example.org>", "RCPT TO:<\"o b\"@example.org>",
                    "RCPT TO:<root>")
        self.assertEqual([entry[0] for entry in asked],
                         ["", "b@example.org", '"o b"@example.org', "root"])
        self.assertEqual({(entry[1], entry[3]) for entry in asked}, {("", "client.example")})

    def test_can_tell_a_recipient_from_the_sender(self):
        def check(address, mail):
            asked.append((address, list(mail.recipients)))
            if mail.recipients and not address.endswith("@example.org"):
                raise msmtpd.PermanentFailure("not relayed")
        asked = []
        client = self.client(self.serve(check=check))
        self.assertEqual(client.open("MAIL FROM:<a@elsewhere.example>",
                                     "RCPT TO:<a@elsewhere.example>"), "553 5.1.3 not relayed")
        self.assertEqual(client.do("RCPT TO:<b@example.org>", "DATA")[:3], "354")
        client.do(".")
        self.assertEqual(asked, [("a@elsewhere.example", []),
                                 ("a@elsewhere.example", ["a@elsewhere.example"]),
                                 ("b@example.org", ["b@example.org"])])
        self.assertEqual(self.mails[0].recipients, ["b@example.org"])

    def test_may_be_objects_that_are_false(self):
        class Listed(set):
            def __call__(self, address, mail):
                if address in self:
                    raise msmtpd.PermanentFailure("listed")
        for deliver in None, msmtpd.Command("true"):
            listed = Listed()
            client = self.client(self.serve(deliver, check=listed))
            listed.add("c@d")
            self.assertEqual(client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>"), "553 5.1.3 listed")

    def test_may_not_be_async(self):
        async def check(address, mail):
            raise msmtpd.PermanentFailure("no")
        for deliver in None, msmtpd.Command("true"):
            with self.assertLogs("msmtpd", "ERROR") as log, warnings.catch_warnings():
                warnings.simplefilter("ignore")         # never awaited
                client = self.client(self.serve(deliver, check=check))
                self.assertEqual(client.open("MAIL FROM:<a@example.org>"),
                                 "451 4.3.0 Internal error")
            self.assertIn("not async ones", log.output[0])

    def test_are_asked_besides_that_of_a_command(self):
        """The command's comes first."""
        def check(address, mail):
            asked.append(address)
            if address.startswith("bad@"):
                raise msmtpd.PermanentFailure("bad")
        asked = []
        server = self.serve(msmtpd.Command("cat; true"), check=check)
        client = self.client(server)
        self.assertEqual(client.open("MAIL FROM:<a@b>", "RCPT TO:<bad@example.org>"),
                         "553 5.1.3 bad")
        self.assertEqual(client.do("RCPT TO:<o'b@example.org>")[:9], "553 5.1.3")
        self.assertEqual(client.do("RCPT TO:<good@example.org>")[:9], "250 2.1.5")
        self.assertEqual(asked, ["a@b", "bad@example.org", "good@example.org"])

    def test_a_refusal_is_one_line_of_the_log(self):
        def check(address, mail):
            raise msmtpd.PermanentFailure("no\nsession 1: fake")
        with self.assertLogs("msmtpd", "INFO") as log:
            self.client(self.serve(check=check)).open("MAIL FROM:<a@example.org>")
        self.assertFalse([line for line in log.output if "\n" in line])

    def test_details_are_for_the_log(self):
        def check(address, mail):
            raise msmtpd.PermanentFailure("no", details=["why\n", "else"])
        with self.assertLogs("msmtpd", "ERROR") as log:
            client = self.client(self.serve(check=check))
            self.assertEqual(client.open("MAIL FROM:<a@example.org>"), "553 5.1.7 no")
        self.assertEqual([line.rpartition(": ")[2] for line in log.output], ["why\\n", "else"])

    def test_may_raise_the_two_failures(self):
        temporary, permanent = msmtpd.TemporaryFailure, msmtpd.PermanentFailure
        for error, sender, recipient in (
                (temporary(), "451 4.1.7 Address refused", "451 4.1.3 Address refused"),
                (temporary("x", 450, "4.2.1"), "450 4.2.1 x", "450 4.2.1 x"),
                (permanent("no"), "553 5.1.7 no", "553 5.1.3 no"),
                (permanent("no", 550, "5.1.1"), "550 5.1.1 no", "550 5.1.1 no"),
                (ValueError("secret"),) + ("451 4.3.0 Internal error",) * 2):
            def check(address, mail):
                if address.startswith("bad@"):
                    raise error
            with self.subTest(error=repr(error)), contextlib.ExitStack() as stack:
                log = None
                if isinstance(error, ValueError):
                    log = stack.enter_context(self.assertLogs("msmtpd", "ERROR"))
                server = self.serve(check=check)
                client = self.client(server)
                self.assertEqual(client.open("MAIL FROM:<bad@example.org>"), sender)
                self.assertEqual(client.do("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>",
                                           "RCPT TO:<bad@example.org>"), recipient)
                client.do("DATA")
                self.assertEqual(client.do("x\r\n."), "250 2.0.0 Delivered")
                self.assertEqual([mail.recipients for mail in self.mails], [["b@example.org"]])
                server.stop()
            self.assertEqual(len(log.records) if log else 0, 2 if log else 0)


class AuthenticatingByAFunction(LibraryCase):

    def setUp(self):
        super().setUp()
        self.patch(AUTH_DELAY=0)

    def login(self, answer, user="us\u20acr", password="p\u00e4ss"):
        """The reply to AUTH, and what the function was called with."""
        authenticate = mock.Mock(side_effect=[answer])
        server = self.serve(authenticate=authenticate)
        client = self.client(server)
        response = base64.b64encode(("\0%s\0%s" % (user, password)).encode()).decode()
        reply = client.open("AUTH PLAIN " + response)
        mail = client.do("MAIL FROM:<a@example.org>")
        if mail[:3] == "250":
            client.do("RCPT TO:<b@example.org>", "DATA", "x\r\n.")
        server.stop()
        return reply, mail, authenticate.call_args[0]

    def test_its_answer_decides(self):
        for answer, reply, mail in (
                (True, "235 2.7.0 Authenticated", "250"), (1, "235 2.7.0 Authenticated", "250"),
                (False, "535 5.7.8 Wrong user name or password", "530"),
                (None, "535 5.7.8 Wrong user name or password", "530")):
            with self.subTest(answer=answer):
                result = self.login(answer)
                self.assertEqual((result[0], result[1][:3]), (reply, mail))
                self.assertEqual(result[2], ("us\u20acr", "p\u00e4ss"))
                self.assertEqual([m.user for m in self.mails],
                                 ["us\u20acr"] if mail == "250" else [])

    def test_what_it_raises_is_answered_by_454_and_the_password_not_logged(self):
        for error in (OSError("hunter2"), SystemExit("hunter2"), asyncio.CancelledError("hunter2")):
            with self.subTest(error=repr(error)), self.assertLogs("msmtpd", "DEBUG") as log:
                reply, mail, _ = self.login(error, password="hunter2")
                self.assertEqual((reply[:9], mail[:3]), ("454 4.7.0", "530"))
            self.assertIn(type(error).__name__, "\n".join(log.output))
            self.assertNotIn("hunter2", "\n".join(log.output))


@unittest.skipUnless(ssl, "no module ssl")
class TLSByAContext(LibraryCase):

    def context(self, **attributes):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(CERTIFICATE_1 + KEY_1)
            file.flush()
            context.load_cert_chain(file.name)
        for name, value in attributes.items():
            setattr(context, name, value)
        return context

    def test_is_used_as_given_by_starttls_and_from_the_first_byte(self):
        trusting = ssl.create_default_context(cadata=CERTIFICATE_1)
        versions = [ssl.TLSVersion.TLSv1_2] + [ssl.TLSVersion.TLSv1_3] * ssl.HAS_TLSv1_3
        names = []
        for starttls in (True, False):
            for version in versions:
                with self.subTest(starttls=starttls, version=version):
                    context = self.context(
                        minimum_version=version, maximum_version=version,
                        sni_callback=lambda tls, name, context: names.append(name))
                    server = self.serve(tls=context, starttls=starttls)
                    with contextlib.ExitStack() as stack:
                        if starttls:
                            client = stack.enter_context(smtplib.SMTP(server.host, server.port))
                            client.ehlo()
                            self.assertTrue(client.has_extn("starttls"))
                            client.sendmail("a@example.org", ["b@example.org"], "plain")
                            client.starttls(context=trusting)
                            client.ehlo()
                        else:
                            client = stack.enter_context(smtplib.SMTP_SSL(
                                server.host, server.port, context=trusting))
                            client.ehlo()
                        self.assertFalse(client.has_extn("starttls"))
                        client.sendmail("a@example.org", ["b@example.org"], "x" * 100000)
                        self.assertEqual(client.sock.version(),
                                         "TLSv1.2" if version.name == "TLSv1_2" else "TLSv1.3")
                    server.stop()
                    self.assertEqual([(mail.tls, mail.size) for mail in self.mails],
                                     [(False, 6)] * starttls + [(True, 100001)])
        self.assertEqual(len(names), 2 * len(versions))

    def test_authentication_waits_for_it(self):
        server = self.serve(tls=self.context(), authenticate=lambda user, password: True)
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo()
            self.assertFalse(client.has_extn("auth"))
            self.assertEqual(client.docmd("AUTH PLAIN AHUAcA==")[0], 538)
            client.starttls(context=ssl.create_default_context(cadata=CERTIFICATE_1))
            self.assertEqual(client.login("user", "password")[0], 235)

    def inside(self):
        """A client within TLS, which knows a cut from an end, and a socket below TLS."""
        client = self.client(self.serve(tls=self.context()))
        client.open("STARTTLS")
        below = client.socket.dup()
        self.addCleanup(below.close)
        context = ssl.create_default_context(cadata=CERTIFICATE_1)
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        inside = context.wrap_socket(client.socket, server_hostname="localhost",
                                     suppress_ragged_eofs=False)
        self.addCleanup(inside.close)
        return inside, below

    def test_its_end_is_told_also_to_one_who_talks_on(self):
        for sent, last in (b"QUIT\r\n", b"221 2.0.0"), (b"FROB\r\n" * 10, b"421 4.7.0"):
            with self.subTest(sent):
                inside, below = self.inside()
                self.freeze()       # so that a farewell lasts
                inside.sendall(sent)
                said = b""
                with contextlib.suppress(ssl.SSLZeroReturnError):
                    for data in iter(lambda: inside.recv(1000), b""):
                        said += data
                self.assertEqual(said.splitlines()[-1][:9], last)
                for _ in range(3 if last[:1] == b"4" else 0):
                    below.sendall(b"x")

    def test_what_is_no_tls_within_it_ends_the_session(self):
        with self.assertLogs("msmtpd", "INFO") as log:
            inside, below = self.inside()
            inside.sendall(b"NOOP\r\n")
            inside.recv(100)
            below.sendall(b"MAIL FROM:<a@example.org>\r\n")
            wait_for(lambda: "closed: " in "".join(log.output), "the end of the session")
        self.assertIn("closed: the client left", "".join(log.output))
        self.assertNotIn("internal error", "".join(log.output))

    def test_stop_is_quick_within_it_too(self):
        server = self.serve(tls=self.context())
        with smtplib.SMTP(server.host, server.port) as client:
            client.starttls(context=ssl.create_default_context(cadata=CERTIFICATE_1))
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
                return super().do_RCPT(argument)

            def do_NOOP(self, argument):
                raise msmtpd.Refused(msmtpd.Reply(450, "4.2.1", argument))

            def do_XLOUD(self, argument):
                return msmtpd.Reply(250, "", argument.upper())

            def do_VRFY(self, argument):
                raise msmtpd.Disconnect()

            def do_RSET(self, argument):
                raise msmtpd.Disconnect(msmtpd.Reply(421, "4.3.2", "Lunch"))

            def do_HELP(self, argument):
                raise ArithmeticError

            def do_DATA(self, argument):
                reply = super().do_DATA(argument)
                reply.enhanced, reply.lines = "", ("number %d" % self.number,)
                return reply

            def do_UNKNOWN(self, argument):
                raise AssertionError("found by what a client sent")

        server = self.serve(session=Grumpy)
        mail = "MAIL FROM:<a@example.org>"
        for lines, rest in (
                ([mail, "RCPT TO:<nobody@example.org>"],
                 "550-5.1.1 No such user\r\n550 5.1.1 here\r\n"),
                ([mail, "RCPT TO:<b@example.org>"], "250 2.1.5 Recipient accepted\r\n"),
                (["NOOP spoken  loud "], "450 4.2.1 spoken  loud\r\n"),
                (["xloud abc"], "250 ABC\r\n"), (["UNKNOWN"], "500 5.5.1 Unknown command\r\n"),
                (["VRFY a"], ""), (["RSET"], "421 4.3.2 Lunch\r\n"),
                (["HELP"], "421 4.3.0 Internal error\r\n"),
                ([mail, "RCPT TO:<b@example.org>", "DATA", "x\r\n."], "250 number 9\r\n")):
            with self.subTest(lines=lines), contextlib.ExitStack() as stack:
                if lines == ["HELP"]:
                    stack.enter_context(self.assertLogs("msmtpd", "ERROR"))
                client = stack.enter_context(Client(server))
                client.open(*lines[:-1])
                client.send(lines[-1] + "\r\n")
                client.socket.shutdown(socket.SHUT_WR)
                self.assertEqual(client.rest(), rest)
        self.assertEqual(len(self.mails), 1)

    def test_several_replies_to_one_verb(self):
        """As LMTP has them: RFC 2033 4.2."""
        class Many(msmtpd.Session):
            def do_DATA(self, argument):
                recipients = self.mail.recipients
                reply = super().do_DATA(argument)
                for recipient in recipients:
                    self.send(msmtpd.Reply(reply.code, reply.enhanced, "For " + recipient))
        client = self.client(self.serve(session=Many))
        client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "RCPT TO:<e@f>", "DATA")
        client.send("x\r\n.\r\n")
        self.assertEqual([client.line(), client.line(), client.do("NOOP")[:3]],
                         ["250 2.0.0 For c@d", "250 2.0.0 For e@f", "250"])

    def test_the_log_tells_of_them(self):
        class Grumpy(msmtpd.Session):
            def do_RCPT(self, argument):
                return msmtpd.Reply(550, "5.1.1", "Nobody")

            def do_RSET(self, argument):
                return msmtpd.Reply(421, "4.3.2", "Lunch")
        with self.assertLogs("msmtpd", "INFO") as log:
            client = self.client(self.serve(session=Grumpy))
            client.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "RSET")
            client.rest()
            wait_for(lambda: "closed" in log.output[-1])
        self.assertEqual([record.getMessage() for record in log.records[1:]],
                         ["session 1: refused RCPT TO:<b@example.org>: 550 5.1.1 Nobody",
                          "session 1: closed: by the server: 421 4.3.2 Lunch"])

    def test_one_that_is_slow_holds_up_no_other(self):
        slow = threading.Event()

        class Slow(msmtpd.Session):
            def do_NOOP(self, argument):
                slow.wait(PATIENCE)
                return super().do_NOOP(argument)
        server = self.serve(session=Slow)
        self.addCleanup(slow.set)
        first, second = self.client(server), self.client(server)
        first.open()
        first.send("NOOP\r\n")
        self.assertEqual(second.open("VRFY a")[:3], "252")
        slow.set()
        self.assertEqual(first.line(), "250 2.0.0 Here")


class AMail(LibraryCase):

    def test_has_an_envelope_and_data(self):
        server = self.serve()
        client = self.client(server)
        head = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\r\n\r\n"
        client.open("MAIL FROM:<> SIZE=100", "RCPT TO:<b@example.org>", "RCPT TO:<c@example.org>",
                    "DATA")
        self.assertEqual(client.do(head + "..x\r\n\u20ac\r\n."), "250 2.0.0 Delivered")
        client.do("HELO [192.0.2.1]", "MAIL FROM:<a@example.org>", "RCPT TO:<root>", "DATA", ".")
        client.do("EHLO x", "MAIL FROM:<\u00e9@example.org> SMTPUTF8", "RCPT TO:<root>", "DATA",
                  " x\r\n.")
        first, second, third = self.mails
        self.assertEqual((first.sender, first.recipients), ("", ["b@example.org", "c@example.org"]))
        self.assertEqual(first.peer, ("127.0.0.1", client.socket.getsockname()[1]))
        self.assertEqual((first.helo, first.user, first.tls, first.smtputf8),
                         ("client.example", None, False, False))
        data = "Subject: =?utf-8?q?gr=C3=BC=C3=9Fe?=\n\n.x\n\u20ac\n".encode()
        for _ in range(2):
            self.assertEqual((first.data, first.file.read(), first.size), (data, data, len(data)))
            self.assertIsInstance(first.message, email.message.EmailMessage)
            self.assertEqual(first.message["Subject"], "gr\u00fc\u00dfe")
        self.assertEqual((second.data, second.size, second.helo), (b"", 0, "[192.0.2.1]"))
        self.assertEqual((third.data, third.sender, third.smtputf8),
                         (b" x\n", "\u00e9@example.org", True))
        self.assertIn("b@example.org", repr(first))

    def test_keeps_its_data_and_lets_go_of_it_without_a_warning(self):
        descriptors = open_descriptors()
        server = self.serve()
        sizes = 10, msmtpd.MAX_MEMORY, msmtpd.MAX_MEMORY + 2, 3 * msmtpd.MAX_MEMORY
        with smtplib.SMTP(server.host, server.port) as client:
            for size in sizes:
                client.sendmail("a@example.org", ["b@example.org"], b"y" * (size - 1) + b"\r\n")
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

    def test_has_a_file_that_the_garbage_collector_never_comes_to_first(self):
        """Or else it would warn that nobody has closed it."""
        gc.collect()        # what the tests before have left
        mail = msmtpd.Mail("a@b", data=b"x" * (msmtpd.MAX_MEMORY + 1))
        mail.itself = mail
        del mail
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            gc.collect()
            found = {type(thing) for thing in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        self.assertIn(msmtpd.Spool, found)
        self.assertFalse([each for each in found if issubclass(each, io.RawIOBase)])

    def test_can_be_made_for_the_tests_of_a_deliver(self):
        mail = msmtpd.Mail("a@example.org", ("b@example.org",), b"Subject: x\n\ny\n")
        self.assertEqual((mail.recipients, mail.data, mail.size, mail.message["Subject"]),
                         (["b@example.org"], b"Subject: x\n\ny\n", 14, "x"))
        self.assertEqual(str(mail.peer), "a local client")

    def test_has_a_received_line_only_where_asked_for(self):
        for received in (False, True):
            with self.subTest(received=received):
                server = self.serve(received=received)
                self.assertEqual(self.sender(server, "A: b").line(), "250 2.0.0 Delivered")
                self.assertEqual(self.mails[0].data.startswith(b"Received: from"), received)
                self.assertEqual(self.mails[0].message["A"], "b")
                server.stop()


class WhatIsLogged(LibraryCase):

    def test_goes_to_the_logger_msmtpd_or_to_one_that_is_given(self):
        for name in ("msmtpd", "project.mail"):
            with self.subTest(name=name), self.assertLogs(name, "INFO") as log:
                options = {} if name == "msmtpd" else {"log": logging.getLogger(name)}
                server = self.serve(**options)
                self.sender(server).line()
                server.stop()
            self.assertEqual({record.name for record in log.records}, {name})
            self.assertRegex("\n".join(log.output), r"session 1: mail from=<a@example\.org> "
                             r"to=<b@example\.org> size=2 status=sent seconds=[0-9.]+")

    def test_tells_what_was_refused_and_keeps_addresses_apart(self):
        with self.assertLogs("msmtpd", "INFO") as log:
            client = self.client(self.serve())
            client.open('MAIL FROM:<"a> to=<x"@b>', "RCPT TO:<-c@d>", "RCPT TO:<c@d>", "DATA",
                        "x\r\n.")
        self.assertIn("INFO:msmtpd:session 1: refused RCPT TO:<-c@d>: 501 5.1.3 Bad address syntax",
                      log.output)
        self.assertIn(r'from=<"a\x3e to=<x"@b> to=<c@d>', "".join(log.output))

    def test_tells_why_a_client_waits_that_ends_its_mail_in_bare_lf(self):
        """As some do over TLS: MIME::Lite, and what writes past the layer that ends its lines."""
        for leaves, data, told in (
                (False, "x\n.\r\n", True), (True, "x\n.\n", True), (True, "\n.\r\n", True),
                (True, "x" * 99999 + "\n.\r\n", True), (False, "x\n..\r\n", False),
                (True, "x\r\n..\r\n", False), (True, "x\n.\r\ny", False), (True, "\n.\r", False)):
            why = "; mail data has to end in CR LF . CR LF" if told else ""
            with self.subTest(data[-9:], leaves=leaves), self.assertLogs("msmtpd", "INFO") as log:
                with Client(self.serve(timeout=0.2)) as client:
                    client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
                    client.send(data)
                    if leaves:
                        client.socket.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.rest(), "" if leaves else
                                     "421 4.4.2 Waited for too long%s\r\n" % why)
                wait_for(lambda: "closed: " in log.output[-1], "the end of the session")
                self.assertEqual(log.output[-1].partition("closed: ")[2], "the client %s%s" % (
                    "left in mid-transaction" if leaves else "was silent or too slow", why))

    def test_has_values_from_outside_escaped_and_cut(self):
        for value, shown in (("a\\nb", "a\\\\nb"), ("a\nb", "a\\nb"), ("x" * 201, "x" * 200),
                             ("\x01" * 200, "\\x01" * 50)):
            self.assertEqual(msmtpd._shown(value), shown)

    def test_changes_no_reply_where_it_fails(self):
        log = mock.Mock(**{"isEnabledFor.return_value": True, "log.side_effect": ArithmeticError})
        self.assertEqual(self.reply_to(None, log=log), ("250 2.0.0 Delivered", "250 2.0.0 Here"))

    def test_an_error_has_its_traceback_on_standard_error_too(self):
        deliver = mock.Mock(side_effect=ArithmeticError("why"), spec=())
        with standard_error() as errors:
            self.reply_to(deliver, log=msmtpd.ErrorsOnly())
        self.assertRegex(errors[0], r"(?s)\Amsmtpd: session 1: deliver raised\n"
                         r"Traceback.*Error: why\n\Z")

    def test_is_printed_nowhere(self):
        for _ in range(3):
            msmtpd.Server(print)
        self.assertLessEqual(len(logging.getLogger("msmtpd").handlers), 1)
        script = SELFTEST.replace("fine", "quiet") + "print('end')"
        done = subprocess.run([sys.executable, "-c", script, "msmtpd"], timeout=PATIENCE,
                              env=dict(os.environ, PYTHONPATH=os.path.dirname(msmtpd.__file__)),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.stdout, done.stderr), (b"quiet\nend\n", b""))

    def test_follows_the_projects_own_configuration(self):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        root = logging.getLogger()
        root.addHandler(handler)
        self.addCleanup(root.removeHandler, handler)
        self.assertEqual(self.reply_to(mock.Mock(side_effect=ArithmeticError("why"), spec=()))[0],
                         "451 4.3.0 Internal error")
        self.assertIn("session 1: deliver raised\nTraceback", stream.getvalue())
        self.assertIn("ArithmeticError: why", stream.getvalue())
        self.assertNotIn("mail from", stream.getvalue())


# CPython's own tests of its SMTP client, with this server in the place of its smtpd

def said(text):
    """A reply in the words of smtpd."""
    return msmtpd.Reply(int(text[:3]), "", *text[4:].split("\n"))


def debugging_session(smtpd):
    """A session that answers and reports as smtpd's DebuggingServer."""
    class Debugging(msmtpd.Session):
        def do_EHLO(self, argument):
            super().do_EHLO(argument)
            return said("250 \nSIZE 33554432\nHELP")

        def do_HELO(self, argument):
            return said("503 Duplicate HELO/EHLO") if self.helo else super().do_HELO(argument)

        def do_NOOP(self, argument):
            return said("250 OK")

        do_RSET = do_NOOP

        def do_EXPN(self, argument):
            return said("502 EXPN not implemented")

        def do_VRFY(self, argument):
            return said("252 Cannot VRFY user, but will accept message and attempt delivery")

        def do_HELP(self, argument):
            return said("250 Supported commands: EHLO HELO MAIL RCPT DATA RSET NOOP QUIT VRFY")

        def do_MAIL(self, argument):
            reply = super().do_MAIL(argument)
            print("sender:", self.mail.sender or "<>", file=smtpd.DEBUGSTREAM)
            return reply

        def do_RCPT(self, argument):
            reply = super().do_RCPT(argument)
            print("recips:", self.mail.recipients, file=smtpd.DEBUGSTREAM)
            return reply
    return Debugging


def simulated_session(tests, server):
    """A session that does what the simulated server of test_smtplib is told to by its tests."""
    class Simulated(msmtpd.Session):
        quit_response = mail_response = rcpt_response = data_response = None
        rcpt_count = rset_count = 0
        disconnect = False

        def __init__(self, *arguments):
            super().__init__(*arguments)
            server._SMTPchannel = self

        def do_EHLO(self, argument):
            super().do_EHLO(argument)
            return msmtpd.Reply(250, "", "testhost", "EXPN", "SIZE 20000000", "STARTTLS",
                                "DELIVERBY", *server.features, "HELP")

        def do_VRFY(self, argument):
            if argument not in tests.sim_users:
                return said("550 No such user: " + argument)
            return said("250 %s %s" % (tests.sim_users[argument], smtplib.quoteaddr(argument)))

        def do_EXPN(self, argument):
            members = tests.sim_lists.get(argument.lower())
            return said("250 " + "\n".join(
                "%s %s" % (tests.sim_users[member], smtplib.quoteaddr(member))
                for member in members) if members else "550 No access for you!")

        def do_AUTH(self, argument):
            if argument == "BUGGY":
                while True:
                    self.ask(b"BuGgYbUgGy")
            if argument == "CRAM-MD5":
                answer = self.ask(base64.b64decode(tests.sim_cram_md5_challenge))
                self.assert_digest(answer.split()[1].decode())
            else:
                super().do_AUTH(argument)
            return said("235 Authentication Succeeded" if self.user != "psu" else "235 Ok")

        def assert_digest(self, digest):
            key, text = tests.sim_auth[1], base64.b64decode(tests.sim_cram_md5_challenge)
            if digest != tests.hmac.HMAC(key.encode(), text, "md5").hexdigest():
                raise msmtpd.Refused(said("535 Authentication credentials invalid"))

        def do_MAIL(self, argument):
            if self.mail_response:
                if self.disconnect:
                    raise msmtpd.Disconnect(said(self.mail_response))
                return said(self.mail_response)
            if self.user is None:
                self.user = ""          # one may send without, here
            super().do_MAIL(argument)
            server.last_mail_options = argument.split()[1:]
            return said("250 OK")

        def do_RCPT(self, argument):
            if self.rcpt_response:
                self.rcpt_count += 1
                return said(self.rcpt_response[self.rcpt_count - 1])
            super().do_RCPT(argument)
            return said("250 OK")

        def do_DATA(self, argument):
            reply = super().do_DATA(argument)
            return said("250 OK") if reply.code == 250 else reply

        def do_RSET(self, argument):
            self.rset_count += 1
            return super().do_RSET(argument)

        def do_QUIT(self, argument):
            if self.quit_response:
                raise msmtpd.Disconnect(said(self.quit_response))
            return super().do_QUIT(argument)
    return Simulated


class InThePlaceOfSmtpd:
    """What the tests want of a server object, by a msmtpd.Server."""

    def __init__(self, deliver, session, authenticate=None):
        self.server = msmtpd.Server(deliver, session=session, authenticate=authenticate)
        self.server.start()
        self.socket = types.SimpleNamespace(getsockname=lambda: self.server.addresses[0])

    @classmethod
    def debugging(cls, tests, session):
        printer = object.__new__(tests.smtpd.DebuggingServer)

        def make(address, remote, decode_data):
            deliver = msmtpd.smtpd_handler(printer.process_message, decode_data=decode_data)
            return cls(deliver, session)
        return make

    @classmethod
    def simulated(cls, tests, features=()):
        def make(address, remote, decode_data, enable_SMTPUTF8=False):
            self = object.__new__(cls)
            self.features, self._addresses, self.channel_class = list(features), {}, None
            self.add_feature = self.features.append

            def process_message(peer, mailfrom, rcpttos, data, **options):
                if self.channel_class:      # set by one test, whose class says this
                    return "421 closing"
                self._addresses.update({"from": mailfrom, "tos": rcpttos})
                self.last_mailfrom, self.last_rcpttos, self.last_message = mailfrom, rcpttos, data
                self.last_rcpt_options = options.get("rcpt_options")
            self.__init__(msmtpd.smtpd_handler(process_message, decode_data=decode_data),
                          simulated_session(tests, self),
                          lambda user, password: (user, password) in (
                              tests.sim_auth, ("psu", "doesnotexist")))
            return self
        return make

    def serve(self, serv_evt, client_evt):
        serv_evt.set()
        client_evt.wait(PATIENCE)
        self.server.stop()
        serv_evt.set()


class InThePlaceOfLoggingsServer(InThePlaceOfSmtpd):
    """The same for the tests of logging's SMTPHandler."""

    def __init__(self, address, handler, *rest):
        super().__init__(msmtpd.smtpd_handler(handler, decode_data=True), msmtpd.Session)
        self.port, self.stop = self.server.port, self.server.stop

    def start(self):
        pass


class CPythonsOwnTests(unittest.TestCase):

    # Those that compare the words of smtpd's replies, or read its DEBUGSTREAM.
    WORDS = {"testNOOP", "testRSET", "testELHO", "testEXPNNotImplemented", "testVRFY",
             "testSecondHELO", "testHELP", "testSendNullSender", "testSendMessageWithAddresses",
             "testSendMessageWithSomeAddresses", "testSendMessageWithSpecifiedAddresses",
             "testSendMessageWithMultipleFrom", "testSendMessageResent"}
    # One reads a buffer of smtpd's, the other says AUTH before EHLO, which is refused here.
    OTHER = {"test_lowercase_mail_from_rcpt_to", "testAUTH_PLAIN_initial_response_auth"}

    @staticmethod
    def module(name):
        """A module of CPython's own tests, where it is installed."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module("test." + name)
        except (ImportError, unittest.SkipTest) as error:
            raise unittest.SkipTest("test.%s is not installed: %s" % (name, error)) from None

    def run_class(self, case, **patches):
        """Run a class of tests with things replaced in its module; return who passed and failed."""
        module = sys.modules[case.__module__]
        result = unittest.TestResult()
        with contextlib.ExitStack() as stack:
            for name, value in patches.items():
                owner = module.smtpd if name == "DebuggingServer" else module
                stack.enter_context(mock.patch.object(owner, name, value))
            suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
            names = {test._testMethodName for test in suite}
            suite.run(result)
        bad = {test.id().rpartition(".")[2].split(" ")[0]: text
               for test, text in result.errors + result.failures}
        self.texts = bad
        return names - set(bad), set(bad)

    def test_smtplib_against_a_server_as_it_is(self):
        tests = self.module("test_smtplib")
        passed, failed = self.run_class(
            tests.DebuggingServerTests, debugging_server=InThePlaceOfSmtpd.serve,
            DebuggingServer=InThePlaceOfSmtpd.debugging(tests, msmtpd.Session))
        self.assertEqual(failed, self.WORDS, self.texts)
        self.assertGreaterEqual(len(passed), 9)

    def test_smtplib_against_sessions_that_speak_like_smtpd(self):
        tests = self.module("test_smtplib")
        servers = {"SimSMTPServer": (), "SimSMTPAUTHInitialResponseServer": (),
                   "SimSMTPUTF8Server": ("SMTPUTF8", "8BITMIME")}
        patches = {name: InThePlaceOfSmtpd.simulated(tests, features)
                   for name, features in servers.items()}
        patches["DebuggingServer"] = InThePlaceOfSmtpd.debugging(
            tests, debugging_session(tests.smtpd))
        for name, least in (("DebuggingServerTests", 22), ("SMTPSimTests", 22),
                            ("SMTPUTF8SimTests", 4), ("SMTPAUTHInitialResponseSimTests", 1)):
            with self.subTest(name=name):
                passed, failed = self.run_class(
                    getattr(tests, name), debugging_server=InThePlaceOfSmtpd.serve, **patches)
                self.assertLessEqual(failed, self.OTHER, self.texts)
                self.assertGreaterEqual(len(passed), least)

    def test_loggings_smtp_handler(self):
        tests = self.module("test_logging")
        passed, failed = self.run_class(tests.SMTPHandlerTest,
                                        TestSMTPServer=InThePlaceOfLoggingsServer)
        self.assertEqual((passed, failed), ({"test_basic"}, set()), self.texts)


# The program

class Options(ProgramCase):
    """What the program says before it serves."""

    def test_version_and_help(self):
        done = self.run_program("--version")
        self.assertEqual((done.returncode, done.stdout.decode()),
                         (0, "msmtpd.py %s\n" % msmtpd.__version__))
        done = self.run_program("--help")
        text = done.stdout.decode()
        self.assertEqual(done.returncode, 0)
        self.assertLessEqual(max(map(len, text.splitlines())), 80)
        for name in ("version help inetd interface port log command auth max-size max-sessions "
                     "timeout delivery-timeout received debug tls-cert-file tls-key-file "
                     "tls-starttls").split():
            self.assertIn("--" + name, text)

    def test_refusals(self):
        here = "--port=0", "--command=true"     # msmtp, if it is missing, would be a warning first
        for arguments, words in (
                (["--port=65536"], "--port"), (["--port=x"], "--port"), (["--port="], "--port"),
                (["--port", "-1"], "--port"), (["--interface="], "--interface"),
                (["--interface=localhost", *here], "localhost. is not an IP address"),
                (["--interface=300.1.1.1", *here], "300.1.1.1. is not an IP address"),
                (["--interface=192.0.2.1", *here], "cannot listen on 192.0.2.1"),
                (["--command="], "--command"), (["--command= "], "empty"),
                (["--command=cat;"], "ends in ;"),
                (["--command=cat 'x"], "Unterminated|unexpected"),
                (["--command=a\nb"], "one line"), (["--log="], "--log"),
                (["--log=/nonexistent/log"], "/nonexistent/log"), (["--auth="], "--auth"),
                (["--auth=,x"], "--auth"), (["--auth=x,"], "write USER"),
                (["--auth=x,false"], "exit status 1"), (["--auth=x,true"], "no password"),
                (["--auth=x,echo"], "no password"), (["--max-size=x"], "--max-size"),
                (["--max-size=-1"], "--max-size"), (["--max-sessions=0"], "--max-sessions"),
                (["--timeout=0"], "--timeout"), (["--timeout=nan"], "--timeout"),
                (["--delivery-timeout=x"], "--delivery-timeout"), (["--received=no"], "--received"),
                (["--tls-key-file=/x"], "--tls-cert-file"), (["--prot=25"], "--port"),
                (["--tls-starttls=off"], "--tls-cert-file"),
                (["word"], "word"), (["-p", "25"], "-p"),
                (["--in"], "did you mean --inetd or --interface"), (["--inetd=1"], "no value"),
                (["--m=5"], "--max-size or --max-sessions"), (["--", "--inetd"], "--inetd; see"),
                (["--command", "msmtp", "-f", "%F"], "-f; options begin with --, and a value"),
                (["--tls-starttls=maybe"], "--tls-starttls")):
            with self.subTest(arguments):
                status, text = self.run_here(*arguments)
                self.assertEqual(status, 3)
                self.assertRegex(text, r"\Amsmtpd: .*\n\Z")
                self.assertRegex(text, words)

    def test_where_python_lacks_modules(self):
        """Cut-down Pythons do; what needs one of them is refused, and all else works."""
        program = self.script("program", (
            "import runpy, sys\n"
            "for name in 'ssl syslog pwd grp resource ctypes difflib'.split():\n"
            "    sys.modules[name] = None\n"
            "runpy.run_path(%r, run_name='__main__')\n") % PROGRAM)
        with mock.patch.object(sys.modules[__name__], "PROGRAM", program):
            for option, words in (("--prot=25", "unknown option --prot; see --help"),
                                  ("--log=syslog", "this system has no syslog; use --log=FILE"),
                                  ("--tls-cert-file=x", "this Python has no ssl module")):
                done = self.run_program("--port=0", option)
                self.assertEqual((done.returncode, done.stdout), (3, b""))
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: %s.*\n\Z" % words)
            process = self.start("--auth=joe,echo secret", "--command=%s --" % self.capture)
            with Client(process) as client:
                client.open("AUTH PLAIN " + base64.b64encode(b"\0joe\0secret").decode(),
                            "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
                self.assertEqual(client.do("x\r\n."), "250 2.0.0 Delivered")
            self.assertEqual(self.stop(process), (0, ""))
            done = self.run_program("--inetd", "--command=%s --" % self.capture,
                                    input=Inetd.DIALOGUE[0])
            self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual([arguments for arguments, _ in self.delivered()],
                         [["--", "b@example.org"], ["--", "c@d"]])

    def test_refusals_are_one_line_where_the_log_is_standard_error(self):
        for arguments in (["--log=-", "--port=x"], ["--debug", "--tls-cert-file=/nonexistent"]):
            done = self.run_program(*arguments)
            self.assertEqual(done.returncode, 3)
            self.assertRegex(done.stderr.decode(), r"\A.* msmtpd\[\d+\] error: .*\n\Z")

    def test_the_first_mistake_is_told_wherever_the_log_is_named(self):
        done = self.run_program("--prot=1", "--log=first", "--inted", "--inetd", "--command",
                                "--log=other", "--log", self.log, cwd=self.folder)
        self.assertEqual((done.returncode, done.stdout[:9], done.stderr), (3, b"421 4.3.0", b""))
        self.assertRegex(self.logged(), r"\A.* error: unknown option --prot; did you mean "
                         r"--port\?; see --help\n\Z")
        self.assertEqual(sorted(os.listdir(self.folder)), ["capture", "log", "mails"])

    def test_sessions_that_cannot_be_had(self):
        """Neither do they fill the memory before the start, nor does one more than there can be."""
        def start(thread):
            if thread.name == "msmtpd-%d" % number:
                raise errors.pop()("no more")
            real(thread)
        real, errors = threading.Thread.start, [MemoryError, MemoryError, RuntimeError]
        for number in (1, 1, 4):
            with mock.patch.object(threading.Thread, "start", start), self.subTest(number):
                if number == 1:
                    status, text = self.run_here("--max-sessions=999999999999", "--port=0",
                                                 "--command=true")
                    self.assertEqual((status, text[:24]), (3, "msmtpd: cannot listen on"))
                    continue
                server = msmtpd.Server(print, max_sessions=10 ** 15)
                with self.assertLogs("msmtpd", "ERROR") as log, server:
                    self.assertEqual(len(server._workers._threads), 2)
                self.assertIn("no more than 2 sessions", log.output[0])

    def test_what_to_do_where_it_cannot_listen(self):
        for number, hint in ((errno.EACCES, "--port=2500"), (errno.EADDRINUSE, "another --port"),
                             (errno.EADDRNOTAVAIL, "no such address")):
            with mock.patch.object(socket, "create_server", side_effect=OSError(number, "why")):
                status, text = self.run_here("--command=true", "--port=0")
            self.assertEqual(status, 3)
            self.assertRegex(text, r"\Amsmtpd: cannot listen on 127.0.0.1 port 0: %s; .*%s"
                             % (os.strerror(number), hint))

    def test_sizes(self):
        for text, size in (("1k", 1024), ("2m", 2 << 20), ("3g", 3 << 30), ("4K", 4096), ("0", 0)):
            self.assertEqual(msmtpd._size(text), size)

    def test_an_older_python_is_refused(self):
        with mock.patch.object(sys, "version_info", (3, 7, 17)):
            self.assertEqual(self.run_here(), (3, "msmtpd: needs Python 3.8 or newer\n"))

    def test_both_forms_and_abbreviations(self):
        daemon = self.start("--po", "0", "--inter", "127.0.0.1", "--command", self.capture,
                            "--max-siz=1K", "--lo=" + self.log)
        with Client(daemon) as client:
            client.reply()
            client.send("EHLO x\r\n")
            self.assertIn("250-SIZE 1024", client.reply())
        self.assertEqual(self.stop(daemon)[0], 0)

    def test_a_value_may_begin_with_a_hyphen(self):
        for arguments, words in ((["--command", "-x;"], "ends in ;"),
                                 (["--port", "--help"], "'--help' is not a port"),
                                 (["--auth", "-user,false"], "exit status 1"),
                                 (["--log", self.folder, "--debug"], "cannot open the log"),
                                 (["--port"], "--port needs a value")):
            with self.subTest(arguments):
                status, text = self.run_here(*arguments)
                self.assertEqual(status, 3)
                self.assertIn(words, text)

    def test_warnings(self):
        for arguments, words in ((["--command=nosuchprogram %F --"], "nosuchprogram"),
                                 (["--command=cat # %F"], "comment"),
                                 (["--interface=0.0.0.0"], "--auth"),
                                 (["--interface=0.0.0.0", "--auth=u,echo x"], "unencrypted")):
            with self.subTest(arguments):
                daemon = self.start(*arguments)
                status, errors = self.stop(daemon)
                self.assertEqual(status, 0)
                self.assertRegex(errors, r"\Amsmtpd: warning: .*%s.*\n\Z" % words)
                self.assertRegex(self.logged(), "warning: .*" + words)
                os.remove(self.log)

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = self.run_program("--port=%d" % taken.getsockname()[1])
        self.assertEqual(done.returncode, 3)
        self.assertIn(b"in use", done.stderr)


class Daemon(ProgramCase):
    """The program as a service."""

    def test_mail_goes_through(self):
        daemon = self.start()
        self.assertEqual(self.send(daemon, "Subject: x\n\n..\n"), "250 2.0.0 Delivered")
        arguments, data = self.delivered()[0]
        self.assertEqual(arguments, ["-f", "a@example.org", "--", "b@example.org"])
        self.assertRegex(data.decode(), r"\AReceived: from client.example \(\[127.0.0.1\]\)\n"
                         r"\tby localhost \(msmtpd\) with ESMTP;\n\t.*\nSubject: x\n\n\.\n\Z")
        self.assertEqual(self.stop(daemon), (0, ""))
        self.assertRegex(self.logged(), r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d msmtpd\[%d\] info: "
                         r"session 1: mail from=<a@example.org> to=<b@example.org> size=%d "
                         r"status=sent exit=0 seconds=\d+\.\d+$" % (daemon.pid, len(data)))

    @unittest.skipUnless(sys.platform == "linux", "no 127.0.0.2")
    def test_several_interfaces(self):
        daemon = self.start("--interface=127.0.0.1", "--interface", "127.0.0.2")
        for host in "127.0.0.1", "127.0.0.2":
            self.assertEqual(self.send((host, daemon.port))[:3], "250")
        self.assertIn("listening on [127.0.0.1]:%d and [127.0.0.2]:%d"
                      % (daemon.port, daemon.port), self.logged())

    @needs_ipv6
    def test_nothing_to_warn_of_on_the_loopback_of_ipv6(self):
        self.assertEqual(self.stop(self.start("--interface=::1")), (0, ""))

    def test_signals_as_whoever_starts_it_may_have_left_them(self):
        def leave():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        daemon = self.start(preexec_fn=leave)
        self.assertEqual(self.send(daemon), "250 2.0.0 Delivered")
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_what_became_of_a_mail(self):
        script = self.script("fail", "#!/bin/sh\necho broken >&2; exit $1\n")
        for status, reply, word in ((1, "554 5.3.0", "failed"), (75, "451 4.3.0", "deferred")):
            daemon = self.start("--command=%s %d" % (script, status), "--received=off")
            self.assertEqual(self.send(daemon),
                             "%s Command failed (exit %d): broken" % (reply, status))
            self.stop(daemon)
            self.assertRegex(self.logged(), r"error: session 1: broken\n.* size=16 status=%s "
                             r"exit=%d seconds=" % (word, status))
            os.remove(self.log)

    def test_without_a_log_its_words_go_to_standard_error(self):
        script = self.script("fail", "#!/bin/sh\necho broken >&2; exit 1\n")
        port = free_port()
        daemon = self.start("--port=%d" % port, "--command=" + script, log=False)
        wait_for(lambda: can_connect(port), "the daemon")
        self.send(("127.0.0.1", port))
        self.assertRegex(self.stop(daemon)[1], r"\Amsmtpd: session \d: broken\n\Z")

    def test_a_command_that_is_not_utf_8_is_logged_all_the_same(self):
        for target in (self.log, "-"):
            with open(self.log + "-" if target == "-" else os.devnull, "wb") as errors:
                self.log += "-" * (target == "-")
                daemon = self.start("--command=true \udcff", "--log=" + target, stderr=errors)
            self.assertEqual(self.stop(daemon)[0], 0)
            self.assertIn("piping mails to: true \\udcff\n", self.logged())

    def test_values_in_the_log_are_escaped_and_cut(self):
        daemon = self.start()
        with Client(daemon) as client:
            client.open("MAIL FROM:<%s@b> SMTPUTF8" % ("x" * 300), "RCPT TO:<\u00fc\u0301@b>",
                        "DATA", "x\r\n.")
        self.stop(daemon)
        self.assertIn("from=<%s>" % ("x" * 200), self.logged())

    def test_debug_shows_the_dialogue_but_no_secret(self):
        daemon = self.start("--debug", "--auth=user,echo secret")
        with Client(daemon) as client:
            client.open("AUTH LOGIN", encoded("user"), encoded("secret"),
                        "AUTH PLAIN " + encoded("\0user\0secret"), encoded("secret"),
                        "AUTH " + encoded("secret"), "MAIL FROM:<a@b>", "QUIT")
        with Client(daemon) as client:      # afterwards, since all others are as late as this one
            client.open("AUTH PLAIN " + encoded("\0user\0guess"))
        self.stop(daemon)
        self.assertIn("C: MAIL FROM:<a@b>", self.logged())
        self.assertIn("S: 250 2.1.0 Sender accepted", self.logged())
        self.assertIn("S: 221 2.0.0 Goodbye", self.logged())
        for secret in ("secret", encoded("secret"), "guess", encoded("\0user\0secret")[:8]):
            self.assertNotIn(secret.lower(), self.logged().lower())     # verbs are in upper case

    def test_log_is_reopened(self):
        for hang_up in (False, True):
            daemon = self.start()
            os.rename(self.log, self.log + ".1")
            if hang_up:
                daemon.send_signal(signal.SIGHUP)
            self.send(daemon)
            wait_for(lambda: "status=sent" in self.logged(), "the new log")
            self.stop(daemon)
            os.remove(self.log)

    def test_a_log_that_fails_changes_no_reply(self):
        folder = os.path.join(self.folder, "logs")
        os.mkdir(folder)
        self.log = os.path.join(folder, "log")
        daemon = self.start()
        shutil.rmtree(folder)
        self.assertEqual(self.send(daemon)[:3], "250")
        os.mkdir(folder)
        self.assertEqual(self.send(daemon)[:3], "250")
        wait_for(lambda: "status=sent" in self.logged(), "the log")
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_log_on_standard_error(self):
        for option in "--log=-", "--debug":
            port = free_port()
            daemon = self.start("--port=%d" % port, option, "--command=cat # %F", log=False)
            wait_for(lambda port=port: can_connect(port), "the daemon")
            with Client(("127.0.0.1", port)) as client:
                client.open("QUIT")
            shown = self.stop(daemon)[1]
            self.assertRegex(shown, r"info: listening on \[127.0.0.1\]:%d" % port)
            self.assertEqual("S: 220 localhost" in shown, option == "--debug")
            self.assertEqual(shown.count("comment"), 1)     # the warning is told once

    def test_a_standard_error_that_nobody_reads(self):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as errors:
            daemon = self.start("--command=nosuchprogram %F", stderr=errors)
        self.assertEqual(self.stop(daemon)[0], 0)

    def test_syslog(self):
        said, log = [], logging.getLogger("msmtpd")
        syslog = types.SimpleNamespace(
            LOG_PID=1, LOG_MAIL=16, LOG_ERR=3, LOG_INFO=6, openlog=lambda *all: said.append(all),
            syslog=lambda *all: said.append(all))
        with mock.patch.dict(sys.modules, syslog=syslog), \
                mock.patch.object(logging, "raiseExceptions", True), \
                mock.patch.multiple(log, handlers=[], propagate=True, level=log.level):
            msmtpd._open_log("syslog", False)
            log.info("two\nlines and %s", "a\0")
            log.error("bad")
            log.debug("unseen")
        log.setLevel(log.level)     # for the cache of the levels that are on
        self.assertEqual(said, [("msmtpd", 1, 16), (6, "info: two"), (6, "lines and a?"),
                                (3, "error: bad")])

    def test_path_where_there_is_none(self):
        script = self.script("path", "#!/bin/sh\n/usr/bin/env > %s/env\n" % self.folder)
        daemon = self.start("--command=" + script, env={})
        self.send(daemon)
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertIn("PATH=%s\n" % msmtpd.DEFAULT_PATH, file.read())

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

    def test_terminal(self):
        daemon, shown = self.on_terminal("--command=cat -- ")
        self.assertRegex(shown, r"\Amsmtpd: listening on \[127.0.0.1\]:%d, piping mails to: cat -- "
                         r" \(to try it: nc 127.0.0.1 %d; .*\)\s+msmtpd: stopping once .*\s+\Z"
                         % (daemon.port, daemon.port))
        _, shown = self.on_terminal("--log=-", log=False)
        self.assertEqual(shown.count("listening on"), 1)

    @unittest.skipUnless(ssl, "no module ssl")
    def test_terminal_says_how_to_try_tls(self):
        path = self.script("both", CERTIFICATE_1 + KEY_1)
        daemon, shown = self.on_terminal("--interface=0.0.0.0", "--auth=joe,echo x",
                                         "--tls-cert-file=" + path, "--tls-starttls=off")
        self.assertIn("try it: openssl s_client -connect [127.0.0.1]:%d;" % daemon.port, shown)

    # A shell puts the socket where systemd does, and keeps its process id for exec.
    INHERIT = ('exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"', "sh", sys.executable,
               PROGRAM)

    def test_inherited_sockets(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            process = subprocess.Popen(
                ["sh", "-c", *self.INHERIT, "--log=" + self.log,
                 "--command=%s; env > %s/env; :" % (self.capture, self.folder)],
                stdin=listener, stderr=subprocess.PIPE)
            self.addCleanup(self.end, process)
        self.assertEqual(self.send(("127.0.0.1", port))[:3], "250")
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertNotIn("LISTEN_", file.read())
        self.assertEqual(self.stop(process), (0, ""))

    def test_inherited_descriptors_that_are_no_such_sockets(self):
        with socket.socket() as deaf, open(os.devnull, "rb") as file:
            deaf.bind(("127.0.0.1", 0))
            for stdin, says in (deaf, "is no listening socket; .*--inetd"), (file, ".+"):
                done = subprocess.run(["sh", "-c", *self.INHERIT], stdin=stdin, check=False,
                                      stderr=subprocess.PIPE, timeout=PATIENCE)
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: descriptor 3 of LISTEN_FDS:? "
                                 r"%s\n\Z" % says)

    def test_sockets_that_were_for_another_process(self):
        for settings in ("LISTEN_PID=1 LISTEN_FDS=1", "LISTEN_PID=$$ LISTEN_FDS=x",
                         "LISTEN_PID=$$", "LISTEN_FDS=1"):
            with self.subTest(settings):
                done = subprocess.run(
                    ["sh", "-c", settings + ' exec "$@"', *self.INHERIT[1:], "--port=0",
                     "--interface=192.0.2.1", "--command=true"], check=False,
                    stderr=subprocess.PIPE, timeout=PATIENCE)
                self.assertRegex(done.stderr, rb"\Amsmtpd: cannot listen on 192.0.2.1 port 0: ")
        done = subprocess.run(["sh", "-c", *self.INHERIT, "--inetd", "--command=true"], check=False,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stdout[:4]), (0, b"220 "))

    def test_what_was_meant_for_it_is_not_for_the_command(self):
        script = self.script("show", "#!/bin/sh\n/usr/bin/env > %s/env\n" % self.folder)
        daemon = self.start("--command=" + script, env={
            **os.environ, "NOTIFY_SOCKET": self.folder + "/nobody", "LISTEN_FDNAMES": "smtp",
            "LISTEN_FDS": "1", "LISTEN_PID": "1"})
        self.send(daemon)
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertNotRegex(file.read(), "NOTIFY_SOCKET|LISTEN_")
        self.assertEqual(self.stop(daemon), (0, ""))

    def test_readiness(self):
        path = os.path.join(self.folder, "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(path)
            notify.settimeout(PATIENCE)
            daemon = self.start(env={**os.environ, "NOTIFY_SOCKET": path})
            self.assertEqual(notify.recv(100), b"READY=1")
            self.stop(daemon)
            self.assertEqual(notify.recv(100), b"STOPPING=1")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Shutdown(ProgramCase):
    """The client's view and the delivered mails always agree."""

    def test_idle(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            daemon = self.start()
            with Client(daemon) as greeted, Client(daemon) as in_transaction:
                greeted.reply()
                in_transaction.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>")
                self.assertEqual(self.stop(daemon, number)[0], 0)
                self.assertEqual(greeted.rest()[:9], "421 4.3.2")
                self.assertEqual(in_transaction.rest()[:9], "421 4.3.2")
            self.assertFalse(can_connect(daemon.port))
            os.remove(self.log)

    def test_in_mail_data(self):
        daemon = self.start()
        with Client(daemon) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("half\r\n")
            daemon.send_signal(signal.SIGTERM)
            wait_for(lambda: not can_connect(daemon.port), "the end of listening")
            self.assertEqual(client.do("whole\r\n."), "250 2.0.0 Delivered")
            self.assertEqual(client.rest()[:9], "421 4.3.2")
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(without_trace(self.delivered()[0][1]), b"half\nwhole\n")

    def test_while_the_command_runs(self):
        go = os.path.join(self.folder, "go")
        script = self.script("slow", "#!/bin/sh\ntouch %s.on\n"
                             "until test -e %s || ! test -d %s; do sleep 0.02; done\n"
                             "exec %s\n" % (go, go, self.folder, self.capture))
        daemon = self.start("--command=" + script)
        with Client(daemon) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("x\r\n.\r\n")
            wait_for(lambda: os.path.exists(go + ".on"), "the command")
            daemon.send_signal(signal.SIGTERM)
            wait_for(lambda: not can_connect(daemon.port), "the end of listening")
            with open(go, "w", encoding="ascii"):
                pass
            self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
            self.assertEqual(client.rest()[:9], "421 4.3.2")
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(len(self.delivered()), 1)

    def test_the_end_of_a_terminal_may_be_told_twice(self):
        """By the kernel and by a shell: the second is no wish to end at once."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        script = self.script("slow", "#!/bin/sh\ntouch %s/on\n"
                             "while test -e %s/on; do sleep 0.02; done\nexec %s\n"
                             % (self.folder, self.folder, self.capture))
        daemon = self.start("--command=" + script, stderr=slave)
        os.close(slave)
        with Client(daemon) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("x\r\n.\r\n")
            wait_for(lambda: os.path.exists(os.path.join(self.folder, "on")), "the command")
            daemon.send_signal(signal.SIGHUP)
            wait_for(lambda: not can_connect(daemon.port), "the end of listening")
            daemon.send_signal(signal.SIGHUP)
            wait_for(lambda: "SigPnd:\t0000000000000000" in status_of(daemon.pid), "the signal")
            os.remove(os.path.join(self.folder, "on"))
            self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
        self.assertEqual(daemon.wait(PATIENCE), 0)
        self.assertEqual(len(self.delivered()), 1)

    def test_second_signal(self):
        """It ends the command, too."""
        script = self.script("slow", "#!/bin/sh\necho $$ > %s/pid\nmv %s/pid %s/on\nsleep 60\n"
                             "exec %s\n" % (*[self.folder] * 3, self.capture))
        daemon = self.start("--command=" + script)
        with Client(daemon) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("x\r\n.\r\n")
            wait_for(lambda: os.path.exists(os.path.join(self.folder, "on")), "the command")
            daemon.send_signal(signal.SIGTERM)
            wait_for(lambda: not can_connect(daemon.port), "the end of listening")
            self.assertEqual(self.stop(daemon)[0], 1)
            self.assertEqual(client.rest(), "")
        with open(os.path.join(self.folder, "on"), encoding="ascii") as file:
            pid = int(file.read())
        wait_for(lambda: not is_running(pid), "the command to end")
        self.assertEqual(self.delivered(), [])


class Inetd(ProgramCase):
    """One session on standard input and output."""

    DIALOGUE = (b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n", b"QUIT\r\n")

    def run_inetd(self, data, *arguments, **options):
        return self.run_program("--inetd", "--command=%s --" % self.capture, *arguments,
                                input=data, **options)

    def inetd(self, *arguments):
        """The program on pipes, as a process."""
        process = subprocess.Popen([sys.executable, PROGRAM, "--inetd", "--command=cat",
                                    *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(self.end, process)
        return process

    def test_pipes(self):
        done = self.run_inetd(b"".join(self.DIALOGUE))
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout.startswith(b"220 localhost ESMTP msmtpd\r\n250-"))
        self.assertTrue(done.stdout.endswith(b"250 2.0.0 Delivered\r\n221 2.0.0 Goodbye\r\n"))
        self.assertEqual(self.delivered()[0][1][:20], b"Received: from x\n\tby")

    def test_exit_status(self):
        fails = "--command=cat >/dev/null; exit 75"
        once = "--command=test -e %s/on && exit 0; touch %s/on; exit 1; :" % ((self.folder,) * 2)
        for data, arguments, status in (
                (b"", (), 0), (b"EHLO x\r\n", (), 0), (b"QUIT\r\n", (), 0),
                (b"EHLO x\r\nMAIL FROM:<a@b>\r\n", (), 1), (self.DIALOGUE[0], (), 0),
                (self.DIALOGUE[0][:-3], (), 1), (b"GET / HTTP/1.0\r\n", (), 1),
                (b"".join(self.DIALOGUE), (fails,), 1), (b"FROB\r\n" * 10, (), 1),
                (self.DIALOGUE[0] + b"".join(self.DIALOGUE), (once,), 1)):
            with self.subTest(data[-20:], arguments=arguments):
                self.assertEqual(self.run_inetd(data, *arguments).returncode, status)

    def test_socket(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, PROGRAM, "--inetd", "--command=%s; echo out; echo err >&2; exit 1"
                 % self.capture, "--log=" + self.log], stdin=theirs, stdout=theirs, stderr=theirs)
            self.addCleanup(self.end, process)
            theirs.close()
            ours.settimeout(PATIENCE)
            ours.sendall(b"".join(self.DIALOGUE))
            replies = ours.makefile("rb").read()
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertTrue(replies.endswith(b"\r\n554 5.3.0 Command failed (exit 1): err\r\n"
                                         b"221 2.0.0 Goodbye\r\n"), replies)
        self.assertEqual(len(self.delivered()), 1)

    def test_a_standard_error_that_is_the_output_only(self):
        done = subprocess.run(
            [sys.executable, PROGRAM, "--inetd", "--command=echo broken >&2; exit 1; :"],
            input=b"".join(self.DIALOGUE), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=PATIENCE, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertNotIn(b"msmtpd: session", done.stdout)

    def test_a_client_that_is_silent(self):
        process = self.inetd("--timeout=0.1")
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertEqual(process.stdout.read().splitlines()[-1][:9], b"421 4.4.2")

    def test_a_client_that_does_not_read(self):
        class Verbose(msmtpd.Session):
            def do_HELP(self, argument):        # more than a pipe holds
                return msmtpd.Reply(214, "", *500 * ["x" * 400])
        server = msmtpd.Server(print, session=Verbose, timeout=0.1)
        reader, writer = os.pipe()
        with open(reader, "rb") as unread, open(writer, "wb") as sink, \
                tempfile.TemporaryFile() as source:
            source.write(b"HELP\r\n")
            source.seek(0)
            serving = threading.Thread(target=server.serve_descriptors, daemon=True,
                                       args=(source.fileno(), sink.fileno()))
            serving.start()
            serving.join(PATIENCE)
            self.assertFalse(serving.is_alive())
            self.assertTrue(unread.read(9000).startswith(b"220 "))

    def test_a_client_that_hears_no_replies(self):
        process = self.inetd("--command=%s --" % self.capture)
        process.stdout.close()
        process.stdin.write(b"".join(self.DIALOGUE))
        process.stdin.close()
        self.assertIn(process.wait(PATIENCE), (0, 1))       # and not that of SIGPIPE
        self.assertEqual(len(self.delivered()), 1)          # as it had ended its data

    @unittest.skipUnless(os.path.exists("/proc/self/status"), "no /proc")
    def test_what_the_command_inherits(self):
        """Descriptors 0 to 2, no ignored or blocked signals, a session; no output to the client.

        It is started without importing ctypes or subprocess.
        """
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        script = self.script("show", "#!/bin/sh\nls -l /proc/$$/fd\n"
                             "exec cat /proc/self/status /proc/self/stat\n")
        command = self.script("command", "#!/bin/sh\nexec %s > %s/shown\n" % (script, self.folder))
        text = ("import os, signal, sys; sys.path.append(sys.argv[1]); import msmtpd\n"
                "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
                "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
                "real = msmtpd._make_server\n"
                "def make_server(*arguments):\n"
                "    made = real(*arguments)\n"
                "    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)\n"
                "    return made\n"
                "msmtpd._make_server = make_server     # as what keyring or ssl loads may\n"
                "status = msmtpd.main(sys.argv[2:])\n"
                "sys.exit(status or len({'ctypes', 'subprocess'} & set(sys.modules)))")
        done = subprocess.run([sys.executable, "-c", text, os.path.dirname(PROGRAM), "--inetd",
                               "--command=" + command], input=b"".join(self.DIALOGUE),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[writer],
                              timeout=PATIENCE, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        with open(os.path.join(self.folder, "shown"), encoding="utf-8") as file:
            shown = file.read()
        self.assertEqual(set(re.findall(r" (\d+) -> (?!.*/show\b)", shown)), {"0", "1", "2"})
        for name in "SigBlk", "SigIgn":
            self.assertEqual(int(re.search(name + r":\s*(\w+)", shown).group(1), 16) % (1 << 31), 0)
        pid, _, _, _, group, session = shown.splitlines()[-1].split()[:6]
        self.assertEqual((group, session), (pid, pid))

    def test_an_environment_with_a_nameless_variable(self):
        # In a session of its own, since os.posix_spawn, which subprocess may use, refuses the name.
        done = self.run_inetd(b"".join(self.DIALOGUE), env={**os.environ, "": "x"},
                              start_new_session=True)
        self.assertEqual(done.returncode, 0)
        self.assertEqual(len(self.delivered()), 1)

    def test_peer_of_a_socket(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, \
                socket.create_connection(listener.getsockname()) as ours:
            theirs = listener.accept()[0]
            with theirs:
                process = subprocess.Popen([sys.executable, PROGRAM, "--inetd", "--command="
                                            + self.capture], stdin=theirs, stdout=theirs)
                self.addCleanup(self.end, process)
            ours.sendall(b"".join(self.DIALOGUE))
            ours.makefile("rb").read()
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertIn(b"from x ([127.0.0.1])\n", self.delivered()[0][1])
        with socket.socket() as unconnected:
            self.assertEqual(msmtpd._peer_behind(unconnected.fileno()), (None, None))

    def test_person_at_a_terminal(self):
        import tty
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        tty.setraw(slave)
        process = subprocess.Popen(
            [sys.executable, PROGRAM, "--inetd", "--command=" + self.capture],
            stdin=slave, stdout=slave, stderr=slave)
        self.addCleanup(self.end, process)
        os.close(slave)
        os.write(master, b"HELO me\nMAIL FROM:me\nRCPT TO:you\nDATA\nHello\n.\nQUIT\n")
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual(without_trace(self.delivered()[0][1]), b"Hello\n")

    def test_refusal_is_told_to_the_client_and_the_log(self):
        done = self.run_inetd(b"", "--auth=x,false", "--log=" + self.log)
        self.assertEqual((done.returncode, done.stdout[:10]), (3, b"421 4.3.0 "))
        self.assertIn("error: the password command of --auth failed", self.logged())
        done = self.run_inetd(b"", "--frob")
        self.assertEqual((done.returncode, done.stdout[:10]), (3, b"421 4.3.0 "))
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as deaf:        # a client that has left
            done = subprocess.run([sys.executable, PROGRAM, "--inetd", "--frob"], stdout=deaf,
                                  stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
                                  timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stderr.count(b"\n")), (3, 1))

    def test_signal(self):
        process = self.inetd()
        self.assertEqual(process.stdout.readline(), b"220 localhost ESMTP msmtpd\r\n")
        wait_for(lambda: "State:\tS" in status_of(process.pid), "it to wait for its client")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.stdout.read()[:9], b"421 4.3.2")
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertLess(time.monotonic() - began, msmtpd.FULL_TIMEOUT / 2)

    def test_closed_descriptors(self):
        """The password command can write to standard error all the same."""
        for closed in ("2>&-", "<&- >&- 2>&-"):
            status = subprocess.run(
                ["sh", "-c", 'exec "$@" ' + closed, "sh", sys.executable, PROGRAM, "--inetd",
                 "--auth=u,echo x >&2 && echo secret"],
                input=b"", stdout=subprocess.PIPE, timeout=PATIENCE, check=False)
            self.assertEqual(status.returncode, 0, closed)


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


class PeerCase(ProgramCase):
    """Tests with programs of others: one that is missing skips the test by its name."""

    def setUp(self):
        super().setUp()
        self.home = {"HOME": self.folder, "PATH": os.environ.get("PATH", os.defpath),
                     "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1"}
        self.tls_files = ("--tls-cert-file=" + self.write("certificate", CERTIFICATE_1),
                          "--tls-key-file=" + self.write("key", KEY_1))

    def write(self, name, data):
        """Write a file that only its owner may read, and return its path."""
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.chmod(path, 0o600)
        return path

    def need(self, *names, where=""):
        """The path of the first of these programs, skipping the test where one is missing."""
        places = os.pathsep.join((where, self.home["PATH"], "/usr/sbin:/sbin"))
        paths = [shutil.which(name, path=places) for name in names]
        for name, path in zip(names, paths):
            if not path:
                self.skipTest("no " + name)
        return paths[0]

    def peer(self, *words, data=b"", status=0, **environment):
        """Run a program to its end, see that it has the right status, and return its output."""
        done = subprocess.run(words, input=data, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=PATIENCE, check=False, cwd=self.folder,
                              env={**self.home, **environment})
        output = done.stdout.decode("utf-8", "replace")
        self.assertEqual(done.returncode, status, output)
        return output

    def spawn(self, *words, **popen):
        """Start a program that is ended with the test."""
        popen.setdefault("env", self.home)
        process = subprocess.Popen(words, stdin=popen.pop("stdin", subprocess.DEVNULL), **popen)
        self.addCleanup(self.end, process)
        return process

    def address(self):
        """Where the daemon that writes to self.log listens, once it does."""
        match = wait_for(lambda: re.search(r"listening on \[(.*?)\]:(\d+)", self.logged()),
                         "a daemon that listens")
        return match.group(1), int(match.group(2))

    def post(self, address, protocol="ESMTP", context=None, **expected):
        """Send the letter by smtplib, within TLS for a context, and see that it arrived."""
        with contextlib.closing(smtplib.SMTP(*address, timeout=PATIENCE)) as client:
            if context:
                client.starttls(context=context)
            self.post_by(client, protocol, **expected)

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


@unittest.skipUnless(ssl, "no module ssl")
class RealClients(PeerCase):
    """The mail programs that people have, each delivering the same letter."""

    def setUp(self):
        super().setUp()
        self.ports = {}

    def port(self, way):
        """The port of a server that wants of its clients no more, AUTH, or TLS and AUTH."""
        if way not in self.ports:
            options = {}
            if way != "plain":
                options["authenticate"] = lambda *login: login == ("joe", "secret")
            if way in ("starttls", "tls"):
                options["tls"] = msmtpd._tls_context(
                    *(word.split("=")[1] for word in self.tls_files))
            server = msmtpd.Server(msmtpd.Command(self.capture + " -f %F --"), received=True,
                                   starttls=way != "tls", **options)
            server.start()
            self.addCleanup(server.stop)
            self.ports[way] = server.port
        return self.ports[way]

    def check_client(self, words, *rows, compare=None, data=LETTER):
        """Run a client's command line once a row of way, protocol and further words.

        `compare` looks at the mail where it is not the very letter that arrives.
        """
        names = {"ca": os.path.join(self.folder, "certificate"),
                 "letter": self.write("letter", LETTER),
                 "unended": self.write("unended", LETTER[:-1]),     # to which some add an end
                 "fingerprint": FINGERPRINT,
                 "login": "joe:secret"}
        for way, protocol, options in rows:
            with self.subTest(way=way, options=options):
                before = len(self.delivered())
                names.update(port=self.port(way), way=way, options=options)
                line = shlex.split(words.replace("{options}", options))
                self.peer(*(word.format_map(names) for word in line), data=data)
                mail, = self.delivered()[before:]
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
        login = "--user=joe --passwordeval='echo secret'"
        trust = "--tls=on --tls-trust-file={ca}"
        self.check_client(
            "msmtp --host=127.0.0.1 --port={port} --from=a@example.org --domain=client.example "
            "{options} -- b@example.org c@example.org",
            ("plain", "ESMTP", ""),
            ("auth", "ESMTPA", "--auth=plain " + login),
            ("auth", "ESMTPA", "--auth=login " + login),
            ("starttls", "ESMTPSA", "--auth=on %s %s" % (login, trust)),
            ("starttls", "ESMTPSA", "--auth=plain --tls=on --tls-certcheck=off " + login),
            ("starttls", "ESMTPSA",
             "--auth=login --tls=on --tls-fingerprint={fingerprint} " + login),
            ("tls", "ESMTPSA", "--auth=plain --tls-starttls=off %s %s" % (login, trust)))

    def test_swaks(self):
        self.need("swaks")
        login = "--auth-user joe --auth-password secret"
        self.check_client(
            "swaks --server 127.0.0.1 --port {port} --from a@example.org "
            "--to b@example.org,c@example.org --ehlo client.example --suppress-data "
            "--data @{unended} {options}",
            ("plain", "ESMTP", ""),
            ("plain", "SMTP", "--protocol SMTP"),
            ("plain", "ESMTP", "--pipeline"),
            ("auth", "ESMTPA", "--auth PLAIN " + login),
            ("auth", "ESMTPA", "--auth LOGIN --pipeline " + login),
            ("starttls", "ESMTPSA", "--tls --auth PLAIN " + login),
            ("tls", "ESMTPSA", "--tls-on-connect --auth LOGIN " + login))

    def test_curl(self):
        self.need("curl")
        if "smtp" not in self.peer("curl", "--version"):
            self.skipTest("no curl with SMTP")
        rows = [(way, protocol, options.replace("URL", "127.0.0.1:{port}/client.example"))
                for way, protocol, options in (
                    ("plain", "ESMTP", "smtp://URL"),
                    ("auth", "ESMTPA", "smtp://URL --user {login} --login-options AUTH=PLAIN"),
                    ("auth", "ESMTPA", "smtp://URL --user {login} --login-options AUTH=LOGIN"),
                    ("starttls", "ESMTPSA", "smtp://URL --user {login} --ssl-reqd --cacert {ca}"),
                    ("tls", "ESMTPSA", "smtps://URL --user {login} --cacert {ca}"))]
        self.check_client("curl --silent --show-error --mail-from a@example.org --mail-rcpt "
                          "b@example.org --mail-rcpt c@example.org --crlf -T - {options}", *rows)

    def test_smtplib(self):
        for way, protocol in (("plain", "ESMTP"), ("auth", "ESMTPA"), ("starttls", "ESMTPSA"),
                              ("tls", "ESMTPSA")):
            with self.subTest(way=way):
                options = {"context": trusting()} if way == "tls" else {}
                client = (smtplib.SMTP_SSL if options else smtplib.SMTP)(
                    "127.0.0.1", self.port(way), timeout=PATIENCE, **options)
                with contextlib.closing(client):
                    if way == "starttls":
                        client.starttls(context=trusting())
                    if way != "plain":
                        client.login("joe", "secret")
                    self.post_by(client, protocol)

    def test_net_smtp(self):
        self.need("perl")
        for module in "Net::SMTP", "Authen::SASL", "IO::Socket::SSL":
            if subprocess.call(["perl", "-M" + module, "-e", "1"], stderr=subprocess.DEVNULL):
                self.skipTest("no perl with " + module)
        script = self.write("send.pl", r"""
            use Net::SMTP;
            my ($port, $way, $ca) = @ARGV;
            my $letter = do { local $/; <STDIN> };
            my $client = Net::SMTP->new("127.0.0.1", Port => $port, Hello => "client.example",
                SSL => $way eq "tls", SSL_ca_file => $ca) or die "no connection: $@";
            $client->starttls(SSL_ca_file => $ca) or die $client->message if $way eq "starttls";
            $client->auth("joe", "secret") or die $client->message unless $way eq "plain";
            $client->mail("a\@example.org") && $client->to("b\@example.org", "c\@example.org")
                && $client->data($letter) && $client->quit or die $client->message;
            """)
        self.check_client("perl %s {port} {way} {ca}" % script, ("plain", "ESMTP", ""),
                          ("auth", "ESMTPA", ""), ("starttls", "ESMTPSA", ""),
                          ("tls", "ESMTPSA", ""))

    def test_nodemailer(self):
        self.need("node")
        self.home["NODE_PATH"] = os.environ.get("NODE_PATH", "")
        if subprocess.call(["node", "-e", "require('nodemailer')"], stderr=subprocess.DEVNULL):
            self.skipTest("no nodemailer")
        script = self.write("send.js", r"""
            const fs = require("fs"), [port, way, ca] = process.argv.slice(2);
            require("nodemailer").createTransport({
                host: "127.0.0.1", port: +port, name: "client.example", secure: way === "tls",
                ignoreTLS: way === "auth", requireTLS: way === "starttls",
                tls: {ca: fs.readFileSync(ca)},
                auth: way === "plain" ? undefined : {user: "joe", pass: "secret"},
            }).sendMail({
                envelope: {from: "a@example.org", to: ["b@example.org", "c@example.org"]},
                raw: fs.readFileSync(0),
            }).catch(error => { console.error(error); process.exit(1); });
            """)
        self.check_client("node %s {port} {way} {ca}" % script, ("plain", "ESMTP", ""),
                          ("auth", "ESMTPA", ""), ("starttls", "ESMTPSA", ""),
                          ("tls", "ESMTPSA", ""))

    def test_git_send_email(self):
        self.need("git")
        if not os.path.exists(os.path.join(self.peer("git", "--exec-path").strip(),
                                           "git-send-email")):
            self.skipTest("no git send-email")
        login = "--smtp-user=joe --smtp-pass=secret"
        self.check_client(
            "git send-email --quiet --confirm=never --suppress-cc=all "
            "'--from=Ann <a@example.org>' --to=b@example.org --to=c@example.org "
            "--smtp-server=127.0.0.1 --smtp-server-port={port} --smtp-domain=client.example "
            "--transfer-encoding=8bit {options} {letter}",
            ("plain", "ESMTP", ""), ("auth", "ESMTPA", "--smtp-auth=PLAIN " + login),
            ("starttls", "ESMTPSA",
             "--smtp-encryption=tls --smtp-ssl-cert-path={ca} --smtp-auth=LOGIN " + login),
            compare=self.check_composed)

    def test_s_nail(self):
        self.need("s-nail")
        self.check_client(
            "s-nail -:/ -Sv15-compat -Ssendwait -Shostname=client.example -Sttycharset=utf-8 "
            "-SDEAD=/dev/null -Stls-ca-file={ca} -Smta=smtp://{options} -r a@example.org "
            "-s Greetings b@example.org c@example.org",
            ("plain", "SMTP", "127.0.0.1:{port} -Ssmtp-auth=none"),
            ("auth", "ESMTPA", "{login}@127.0.0.1:{port} -Ssmtp-auth=plain"),
            ("auth", "ESMTPA", "{login}@127.0.0.1:{port} -Ssmtp-auth=login"),
            ("starttls", "ESMTPSA", "{login}@localhost:{port} -Ssmtp-auth=plain "
             "-Ssmtp-use-starttls"),
            compare=self.check_composed, data=TEXT.encode())

    def test_mutt(self):
        self.need("mutt")
        common = ("set ssl_starttls=no ssl_force_tls=no smtp_pass=secret send_charset=utf-8 "
                  "hostname=client.example from=a@example.org copy=no "
                  "certificate_file=%s/certificate" % self.folder)
        rc = self.write("muttrc", common)
        self.check_client(
            "mutt -F %s {options} -s Greetings -- b@example.org c@example.org" % rc,
            ("plain", "ESMTP", "-e 'set smtp_url=smtp://127.0.0.1:{port}'"),
            ("auth", "ESMTPA", "-e 'set smtp_url=smtp://joe@127.0.0.1:{port} "
             "smtp_authenticators=plain'"),
            ("auth", "ESMTPA", "-e 'set smtp_url=smtp://joe@127.0.0.1:{port} "
             "smtp_authenticators=login'"),
            ("starttls", "ESMTPSA", "-e 'set smtp_url=smtp://joe@127.0.0.1:{port} "
             "ssl_starttls=yes ssl_force_tls=yes'"),
            compare=self.check_composed, data=TEXT.encode())

    def test_esmtp(self):
        """And so libesmtp, which names the recipients from the last to the first."""
        self.need("esmtp")
        self.home["SSL_CERT_FILE"] = os.path.join(self.folder, "certificate")
        for way, protocol in (("plain", "ESMTP"), ("auth", "ESMTPA"), ("starttls", "ESMTPSA")):
            login = "" if way == "plain" else 'username = "joe"\npassword = "secret"\n'
            rc = self.write("esmtprc", 'hostname = "localhost:%d"\n%sstarttls = %s\n' % (
                self.port(way), login, "required" if way == "starttls" else "disabled"))
            self.check_client("esmtp -C %s -f a@example.org c@example.org b@example.org" % rc,
                              (way, protocol, ""), compare=self.check_composed)

    def test_smtp_source(self):
        source = os.environ.get("SMTP_SOURCE") or self.need("smtp-source")
        self.home["LD_LIBRARY_PATH"] = os.environ.get("LD_LIBRARY_PATH", "")
        port = self.port("plain")
        self.peer(source, "-s", "8", "-m", "12", "-f", "a@example.org", "-t", "b@example.org",
                  "-M", "client.example", "-F", self.write("letter", LETTER), "127.0.0.1:%d" % port)
        mails = self.delivered()
        self.assertEqual(len(mails), 12)
        for mail in mails:
            self.check_mail(mail, "SMTP", ENVELOPE[:4], LETTER + b"\n")   # which it adds


class Devices(ServerCase):
    """Clients that cannot be had for a test, in the dialogues that they hold."""

    LOGIN = {"authenticate": lambda user, password: (user, password) == ("joe", "secret")}
    EXTENSIONS = ("S: 250-localhost\nS: 250-PIPELINING\nS: 250-SIZE 67108864\nS: 250-8BITMIME\n"
                  "S: 250-SMTPUTF8\nS: 250-ENHANCEDSTATUSCODES\nS: 250 AUTH PLAIN LOGIN\n")
    MAIL = "S: 354\nC: Subject: scan\nC: \nC: See attachment\nC: .\nS: 250 2.0.0 Delivered\n"

    def check_device(self, dialogue, recipients=("b@example.org",), user="joe", mails=1, **options):
        """Hold a dialogue and look at the mails.

        The extensions behind EHLO, the mail behind DATA, greeting and end are put in here.
        """
        dialogue = textwrap.dedent(dialogue)
        dialogue = re.sub("(?mi)^C: EHLO.*\n", r"\g<0>" + self.EXTENSIONS, dialogue)
        dialogue = re.sub("(?mi)^C: DATA\n", r"\g<0>" + self.MAIL, dialogue)
        arrived = self.check_dialogue(
            "S: 220 localhost ESMTP msmtpd\n%sC: QUIT\nS: 221 2.0.0 Goodbye\n" % dialogue,
            **(self.LOGIN if user else {}), **options)
        self.assertEqual([vars_of(mail)[:3] + (mail.user,) for mail in arrived],
                         [("a@example.org", list(recipients), b"Subject: scan\n\nSee attachment\n",
                           user)] * mails)

    def test_printer_asks_login_with_the_exact_prompts(self):
        self.check_device("""\
            C: EHLO [192.168.1.20]
            C: AUTH LOGIN
            S: 334 VXNlcm5hbWU6
            C: am9l
            S: 334 UGFzc3dvcmQ6
            C: c2VjcmV0
            S: 235 2.7.0 Authenticated
            C: MAIL FROM: <a@example.org>
            S: 250 2.1.0
            C: RCPT TO: <b@example.org>
            S: 250 2.1.5
            C: DATA
            """)

    def test_camera_says_ehlo_then_helo_then_auth(self):
        self.check_device("""\
            C: EHLO IP CAMERA
            C: HELO IP CAMERA
            S: 250 localhost
            C: auth login
            S: 334 VXNlcm5hbWU6
            C: am9l
            S: 334 UGFzc3dvcmQ6
            C: c2VjcmV0
            S: 235
            C: mail from:<a@example.org>
            S: 250
            C: rcpt to:<b@example.org>
            S: 250
            C: data
            """)

    def test_dot_net_gives_the_user_with_auth_login(self):
        self.check_device("""\
            C: EHLO WIN-HOST
            C: AUTH login am9l
            S: 334 UGFzc3dvcmQ6
            C: c2VjcmV0
            S: 235
            C: MAIL FROM:<a@example.org>
            S: 250
            C: RCPT TO:<b@example.org>
            S: 250
            C: DATA
            """)

    def test_raid_controller_writes_no_angle_brackets(self):
        self.check_device("""\
            C: HELO
            S: 250 localhost
            C: MAIL FROM:a@example.org
            S: 250 2.1.0
            C: RCPT TO: b@example.org
            S: 250 2.1.5
            C: RCPT TO:root
            S: 250 2.1.5
            C: DATA
            """, ("b@example.org", "root"), user=None)

    def test_keeping_a_connection_alive(self):
        self.check_device("C: HELO client.example\nS: 250\n" + 3 * textwrap.dedent("""\
            C: NOOP
            S: 250 2.0.0
            C: NOOP are you there
            S: 250 2.0.0
            C: MAIL FROM:<a@example.org>
            S: 250
            C: RCPT TO:<b@example.org>
            S: 250
            C: DATA
            C: RSET
            S: 250 2.0.0
            """), user=None, mails=3)

    def test_parameters_that_are_not_offered(self):
        self.check_device("""\
            C: HELO client.example
            S: 250
            C: MAIL FROM:<a@example.org> AUTH=<> RET=HDRS ENVID=QQ314159 SIZE=35 BODY=8BITMIME
            S: 250
            C: RCPT TO:<b@example.org> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@example.org
            S: 250
            C: RCPT TO:<c@example.org> NOTIFY=NEVER
            S: 250
            C: DATA
            """, ("b@example.org", "c@example.org"), user=None)


class Services(PeerCase):
    """Started by the programs that start services."""

    @staticmethod
    def from_the_manual(pattern):
        """What a pattern finds in the manual page, as it is to be typed."""
        try:
            file = open(os.path.join(HERE, "msmtpd.1"), encoding="utf-8")
        except OSError:
            raise unittest.SkipTest("no msmtpd.1") from None
        with file:
            found = re.search(pattern, file.read(), re.DOTALL | re.MULTILINE).group(1)
        return found.replace("\\e\n", "").replace("/usr/local/bin/msmtpd", PROGRAM)

    def test_start_stop_daemon(self):
        tool = self.need("start-stop-daemon")
        self.need("python3")        # which the program's first line names
        pidfile = os.path.join(self.folder, "pid")
        # What is still there after a failure must not outlive the test.
        self.addCleanup(self.peer, tool, "--stop", "--oknodo", "--pidfile", pidfile,
                        "--signal", "KILL")
        for program, end in ((["--exec", PROGRAM, "--"], ["--quiet", "--signal", "TERM"]),
                             (["--exec", sys.executable, "--", PROGRAM],
                              ["--exec", sys.executable, "--retry=TERM/60/KILL/5"])):
            with self.subTest(program=program):
                self.log = os.path.join(self.folder, "log%d" % len(program))
                start = [tool, "--start", "--pidfile", pidfile, "--make-pidfile", "--background",
                         *program, "--port=0", "--command=%s -f %%F --" % self.capture,
                         "--log=" + self.log]
                self.peer(*start)
                self.post(self.address())
                self.peer(tool, "--status", "--pidfile", pidfile)
                if sys.executable in end:       # the form that notices what runs
                    self.assertIn("already running", self.peer(*start, status=1))
                self.peer(tool, "--stop", "--pidfile", pidfile, "--remove-pidfile", *end)
                wait_for(lambda: self.logged().endswith("info: stopped\n"), "the daemon to stop")
                self.assertFalse(os.path.exists(pidfile))

    def test_inetd(self):
        inetd = self.need("inetd")
        line = self.from_the_manual(r"^(127.0.0.1:25 stream tcp nowait msmtpd \S+ msmtpd --inetd) ")
        for options, protocol in [((), "ESMTP")] + [(self.tls_files, "ESMTPS")] * bool(ssl):
            with self.subTest(protocol=protocol):
                port = free_port()
                conf = self.write("inetd.conf", " ".join((
                    line.replace(":25 ", ":%d " % port).replace(
                        " msmtpd /", " %s /" % pwd.getpwuid(os.getuid()).pw_name),
                    "--command=" + self.capture, "--log=" + self.log, *options)) + "\n")
                service = self.spawn(inetd, "-d", conf, stderr=subprocess.DEVNULL)
                wait_for(lambda port=port: can_connect(port), "inetd")
                self.post(("127.0.0.1", port), protocol, trusting() if options else None,
                          envelope=ENVELOPE[3:])
                service.terminate()
                service.wait(PATIENCE)

    def test_compiled_program_of_the_manual(self):
        library = os.path.join(self.folder, "library")
        os.mkdir(library)
        source = shutil.copy(msmtpd.__file__, library)
        done = subprocess.run([sys.executable, "-m", "compileall", "-q", library], check=False)
        self.assertEqual(done.returncode, 0)
        # The same size and time, so that Python takes what was compiled: this it cannot read.
        status = os.stat(source)
        with open(source, "w", encoding="ascii") as file:
            file.write("?" * status.st_size)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        start = self.write("start", self.from_the_manual(r"^(#!/usr/bin/python3 .*?)^\.Ed").replace(
            "/usr/local/lib/msmtpd", library))
        done = subprocess.run([sys.executable, "-S", start, "--inetd", "--command=" + self.capture],
                              input=b"".join(Inetd.DIALOGUE), stdout=subprocess.PIPE,
                              timeout=PATIENCE, check=False)
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"250 2.0.0 Delivered\r\n", done.stdout)
        self.assertEqual(len(self.delivered()), 1)

    def test_systemd_units_of_the_manual(self):
        self.need("systemd-analyze")
        for kind in "socket", "service":
            self.write("msmtpd." + kind, self.from_the_manual(
                r"^\.Pa \S+/msmtpd\.%s :\n\.Bd [^\n]*\n(.*?)^\.Ed" % kind))
        self.assertEqual(self.peer("systemd-analyze", "verify", "./msmtpd.socket",
                                   "./msmtpd.service"), "")

    def test_systemd_socket(self):
        tool = self.need("systemd-socket-activate")
        for activate, option in (((), "--debug"), (("--inetd", "--accept"), "--inetd")):
            with self.subTest(option=option):
                port = free_port()
                service = self.spawn(
                    tool, "--listen=127.0.0.1:%d" % port, *activate, sys.executable, PROGRAM,
                    option, "--command=%s -f %%F --" % self.capture, "--log=" + self.log,
                    stderr=subprocess.DEVNULL)
                wait_for(lambda port=port: can_connect(port), "the socket")
                self.post(("127.0.0.1", port))
                self.post(("127.0.0.1", port))
                service.terminate()
                if not activate:        # it has become the daemon
                    self.assertEqual(service.wait(PATIENCE), 0)
                    self.assertIn("listening on [127.0.0.1]:%d" % port, self.logged())

    @unittest.skipUnless(sys.platform == "linux", "no abstract sockets")
    def test_systemd_is_notified_on_an_abstract_socket(self):
        name = "msmtpd-test-%d" % os.getpid()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind("\0" + name)
            notify.settimeout(PATIENCE)
            process = self.start(env={**os.environ, "NOTIFY_SOCKET": "@" + name})
            self.assertEqual(notify.recv(100), b"READY=1")
            self.assertEqual(self.stop(process)[0], 0)
            self.assertEqual(notify.recv(100), b"STOPPING=1")

    def become_nobody(self):
        """The words that start a program as a user that does not exist, where one may."""
        words = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
        may = not os.getuid() and shutil.which(words[0]) and not subprocess.call(
            [*words, sys.executable, "-c", "import os, sys; os.listdir(sys.argv[1])", self.folder],
            stderr=subprocess.DEVNULL)
        return words if may else []

    def alone(self, *wrapper):
        """Start a copy of the file in an empty folder, without an environment; return the process.

        Nothing is writable for it but what the command needs, and the place of temporary files.
        """
        place = os.path.join(self.folder, "alone")
        os.mkdir(place)
        os.chmod(shutil.copy(PROGRAM, place), 0o444)
        os.chmod(place, 0o555)
        os.chmod(self.folder, 0o755)
        os.chmod(os.path.join(self.folder, "mails"), 0o777)
        self.addCleanup(os.chmod, place, 0o755)
        with open(self.log, "wb") as log:
            return self.spawn(
                *wrapper, *self.become_nobody(), sys.executable, "-I", "-S", "-W", "error",
                os.path.join(place, os.path.basename(PROGRAM)), "--port=0", "--log=-",
                "--command=%s -f %%F --" % self.capture, cwd=place, env={}, stderr=log)

    def check_alone(self, end):
        """See that it serves, also a mail beyond its memory, and ends well and without warnings."""
        address = self.address()
        self.post(address)
        with smtplib.SMTP(*address, timeout=PATIENCE) as client:
            client.sendmail("a@example.org", ["b@example.org"], b"x" * 2000000)
        self.assertEqual(len(without_trace(self.delivered()[-1][1])), 2000001)
        self.assertEqual(end(), 0)
        for line in self.logged().splitlines():
            self.assertRegex(line, r"\A\d{4}-\d\d-\d\d [\d:]+ msmtpd\[\d+\] info: ")
        self.assertEqual(os.listdir(os.path.join(self.folder, "alone")), ["msmtpd.py"])

    def test_the_file_alone(self):
        process = self.alone()
        self.check_alone(lambda: self.stop(process)[0])

    def test_container(self):
        space = ["unshare", *["--user"] * bool(os.getuid()), "--pid", "--fork", "--kill-child"]
        if not shutil.which("unshare") or subprocess.call(
                space + ["true"], stderr=subprocess.DEVNULL):
            self.skipTest("no unshare, or no right to it")
        process = self.alone(*space)

        def end():
            with open("/proc/{0}/task/{0}/children".format(process.pid)) as children:
                os.kill(int(children.read()), signal.SIGTERM)
            return process.wait(PATIENCE)
        self.check_alone(end)
        self.assertIn(" msmtpd[1] ", self.logged())


class Passwords(PeerCase):
    """Where --auth finds its password, and what it says where it does not."""

    def check_login(self, address, user="msmtpd-user", password="secret"):
        """See that this is the password, and another is not."""
        with contextlib.closing(smtplib.SMTP(*address, timeout=PATIENCE)) as client:
            client.login(user, password)
            self.post_by(client, "ESMTPA")

    def check_refusal(self, *arguments, says, **options):
        """See that the program does not start, and says why in one line."""
        done = self.run_program("--port=0", *arguments, start_new_session=True, **options)
        self.assertEqual((done.returncode, done.stdout), (3, b""))
        self.assertRegex(done.stderr.decode(), r"\Amsmtpd: .*%s.*\n\Z" % says)

    def test_key_ring(self):
        self.need("dbus-run-session", "gnome-keyring-daemon", "secret-tool")
        run = "%s %s --auth=msmtpd-user --port=0" % (sys.executable, PROGRAM)
        script = self.script("session", r"""#!/bin/sh
            unlock() { printf ring | gnome-keyring-daemon --unlock --components=secrets; }
            case $1 in
            empty)
                unlock
                %(run)s 2> empty
                printf secret | secret-tool store --label=msmtpd \
                    host localhost service smtp user msmtpd-user
                secret-tool lookup host localhost service smtp user msmtpd-user ;;
            locked)
                %(run)s 2> locked ;;
            unlocked)
                unlock
                %(run)s --command='%(capture)s -f %%F --' --log=%(log)s ;;
            esac
            """ % {"run": run, "capture": self.capture, "log": self.log})
        environment = {**self.home, "XDG_RUNTIME_DIR": self.folder}

        def session(what):
            return self.spawn("dbus-run-session", "--", script, what, env=environment,
                              cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              start_new_session=True)
        self.assertTrue(session("empty").communicate(timeout=PATIENCE)[0].endswith(b"secret"))
        session("locked").communicate(timeout=PATIENCE)
        for name in "empty", "locked":
            with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                self.assertRegex(file.read(), r"\Amsmtpd: no password for msmtpd-user: "
                                 r"secret-tool: .*, no terminal to ask on; store one with .*\n\Z")
        process = session("unlocked")
        self.check_login(self.address())
        daemon = int(re.search(r"msmtpd\[(\d+)\]", self.logged()).group(1))
        os.kill(daemon, signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0)

    def test_gpg(self):
        self.need("gpg", "gpgconf")
        home = tempfile.mkdtemp(prefix="gpg-", dir="/tmp")  # a short path: it becomes a socket's
        self.addCleanup(shutil.rmtree, home, ignore_errors=True)
        self.home["GNUPGHOME"] = home
        self.addCleanup(self.peer, "gpgconf", "--kill", "all")
        self.peer("gpg", "--batch", "--quiet", "--passphrase", "", "--quick-generate-key",
                  "msmtpd@localhost", "future-default", "default", "never")
        file = os.path.join(self.folder, "password.gpg")
        self.peer("gpg", "--batch", "--quiet", "--trust-model=always", "-e",
                  "-r", "msmtpd@localhost", "-o", file, data=b"secret\nand a second line\n")
        process = self.start("--auth=msmtpd-user,gpg -q -d " + file, env=self.home)
        self.check_login((process.host, process.port))
        self.write("password.gpg", "no such thing")
        self.check_refusal("--auth=msmtpd-user,gpg -q -d %s 2>/dev/null" % file, env=self.home,
                           says="password command of --auth failed, with exit status 2")

    def test_what_a_look_up_that_fails_prints_is_no_password(self):
        self.home["PATH"] = self.folder
        for script, says in (("echo usage; exit 2", "no such entry"),
                             ("printf 'pa\\377ss'", "secret-tool: its output is not UTF-8")):
            self.script("secret-tool", "#!/bin/sh\n" + script + "\n")
            with self.subTest(script):
                self.check_refusal("--auth=joe", env=self.home, says=says)

    def test_keyring(self):
        get, asked = mock.Mock(side_effect=["secret", None, RuntimeError("No back end")]), []
        with mock.patch.dict(sys.modules, keyring=types.SimpleNamespace(get_password=get)):
            for result in "secret", "", "":
                asked.append(msmtpd._ask_keyring("joe"))
                self.assertEqual(asked[-1][0], result)
        self.assertEqual(get.call_args[0], ("smtp://localhost", "joe"))
        self.assertEqual([why for _, why in asked[1:]],
                         ["keyring: no such entry", "keyring: No back end"])

    def test_each_place_is_looked_at_only_in_its_turn(self):
        keyring = types.SimpleNamespace(get_password=mock.Mock(return_value="from keyring"))
        with mock.patch.dict(sys.modules, keyring=keyring), \
                mock.patch.object(msmtpd, "_run_lookup") as run, \
                mock.patch.object(msmtpd, "_ask_terminal") as terminal:
            for found, password in ("from secret-tool", "from secret-tool"), ("", "from keyring"):
                run.return_value = found, "no"
                self.assertEqual(msmtpd._find_password("joe", "", False), password)
                self.assertEqual(keyring.get_password.call_count, 0 if found else 1)
            terminal.assert_not_called()

    def test_keychain(self):
        self.script("security", "#!/bin/sh\necho \"$@\"\n")
        with mock.patch.dict(os.environ, PATH=self.folder), \
                mock.patch.dict(sys.modules, keyring=None), \
                mock.patch.object(sys, "platform", "darwin"):
            self.assertEqual(msmtpd._find_password("joe", "", True),
                             "find-internet-password -s localhost -r smtp -a joe -w")

    def test_a_password_is_a_whole_line(self):
        self.assertEqual(msmtpd._first_line(b" se cret\t \r\nmore\n"), " se cret\t ")
        self.assertEqual(msmtpd._first_line(b"\0x\ry"), "\0x\ry")

    def test_a_command_reads_standard_input_unless_that_is_a_client(self):
        self.check_refusal("--interface=192.0.2.1", "--command=true",
                           "--auth=joe,read answer && echo $answer", input=b"secret\n",
                           says="cannot listen on 192.0.2.1")       # the password was in order
        done = self.run_program("--inetd", "--command=true", "--auth=joe,cat >&2; echo secret",
                                input=b"QUIT\r\n")
        self.assertEqual((done.returncode, done.stdout.splitlines()[-1][:3]), (0, b"221"))

    def test_commands_that_print_none(self):
        for command, says in (("exit 7", "failed, with exit status 7"),
                              ("true", "printed no password"),
                              ("echo; echo secret", "printed no password"),
                              ("printf '\\377\\n'", "printed text that is not UTF-8"),
                              ("no-such-program 2>/dev/null", "failed, with exit status 127")):
            with self.subTest(command=command):
                self.check_refusal("--auth=joe," + command, says=says)

    def test_no_key_ring_and_no_terminal(self):
        self.home["PATH"] = self.folder     # no secret-tool
        for way in (), ("--inetd",):
            self.log = os.path.join(self.folder, "log-" + "".join(way))
            done = self.run_program("--auth=joe", "--port=0", "--log=" + self.log, *way,
                                    env=self.home, start_new_session=True)
            self.assertEqual(done.returncode, 3)
            said = (self.logged() if way else done.stderr.decode())
            self.assertRegex(said, "no password for joe: .*no program secret-tool, .*%s; store one "
                             "with \"secret-tool store " % ("no prompt under inetd" if way
                                                            else "no terminal to ask on"))
            self.assertEqual(done.stdout[:10], b"421 4.3.0 " if way else b"")

    def at_terminal(self, *arguments):
        """Start the program on a terminal of its own; return it and the terminal's other side."""
        self.script("secret-tool", "#!/bin/sh\nexit 1\n")
        self.home["PATH"] = self.folder + os.pathsep + os.environ.get("PATH", os.defpath)
        mine, its = pty.openpty()
        self.addCleanup(os.close, mine)

        def prepare():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)    # where it is ignored for the tests
        process = self.spawn(
            sys.executable, PROGRAM, "--port=0", "--command=%s -f %%F --" % self.capture,
            *arguments, stdin=its, stdout=its, stderr=its, env=self.home,
            start_new_session=True, preexec_fn=prepare)
        os.close(its)
        return process, mine

    def read_terminal(self, terminal, until=None):
        """What the terminal shows, up to a pattern or, if there is none, the end."""
        shown = ""
        while not (until and re.search(until, shown)):
            if not select.select([terminal], (), (), PATIENCE)[0]:
                raise AssertionError("waited in vain for %r behind %r" % (until, shown))
            try:
                data = os.read(terminal, 1000)
            except OSError:     # Linux's end of input
                data = b""
            if not data:
                break
            shown += data.decode()
        return shown.replace("\r\n", "\n")

    def test_prompt(self):
        process, terminal = self.at_terminal("--auth=joe", "--log=" + self.log)
        self.read_terminal(terminal, "Password of joe: ")
        os.write(terminal, b"secret\n")
        self.check_login(self.address(), "joe")
        shown = self.read_terminal(terminal, "Ctrl-C.*\n")
        self.assertNotIn("secret", shown)
        self.assertIn("listening on [127.0.0.1]:", shown)
        os.write(terminal, b"\x03")
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertNotIn("Traceback", self.read_terminal(terminal))

    def test_prompt_without_an_answer(self):
        # Return, the end of input, Latin-1 and Ctrl-C.
        for typed in b"\n", b"\x04", b"p\xe4ss\n", b"\x03":
            with self.subTest(typed=typed):
                process, terminal = self.at_terminal("--auth=joe")
                self.read_terminal(terminal, "Password of joe: ")
                os.write(terminal, typed)
                if not select.select([terminal], (), (), 3)[0]:
                    os.write(terminal, typed)   # a signal right before the read does not end it
                shown = self.read_terminal(terminal)
                self.assertRegex(shown, r"\A\s*msmtpd: \S.*\n\Z")
                self.assertEqual(process.wait(PATIENCE), 3)


@unittest.skipUnless(ssl, "no module ssl")
class Encryption(PeerCase):
    """TLS, as the program serves it: see RealClients for those who use it."""

    def serve(self, *options):
        """A daemon with TLS and a login, and its address."""
        process = self.start("--auth=joe,echo secret", *(options or self.tls_files))
        return process, (process.host, process.port)

    def connect(self, address, certificate=CERTIFICATE_1):
        """A client within TLS."""
        client = smtplib.SMTP(*address, timeout=PATIENCE)
        self.addCleanup(client.close)
        client.starttls(context=trusting(certificate))
        return client

    def test_login_only_inside(self):
        process, address = self.serve()
        with Client(address) as client:
            client.reply()
            client.send("EHLO client.example\r\n")
            offered = client.reply()
            self.assertIn("250 STARTTLS", offered)
            self.assertNotIn("AUTH", "".join(offered))
            for line, reply in (("AUTH PLAIN AGpvZQBzZWNyZXQ=", "538 5.7.11"),
                                ("MAIL FROM:<a@example.org>", "530 5.7.0"),
                                ("STARTTLS now", "501 5.5.4"), ("NOOP", "250")):
                self.assertEqual(client.do(line)[:len(reply)], reply)
        client = self.connect(address)
        client.ehlo("client.example")
        self.assertEqual((client.has_extn("starttls"), client.esmtp_features["auth"]),
                         (False, " PLAIN LOGIN"))
        self.assertEqual(client.docmd("STARTTLS")[0], 503)
        self.assertEqual(client.docmd("MAIL FROM:<a@example.org>")[0], 530)
        client.login("joe", "secret")
        self.post_by(client, "ESMTPSA")

    def test_session_starts_afresh_and_without_what_came_before(self):
        process, address = self.serve()
        with Client(address) as client:
            client.open()
            client.send("STARTTLS\r\nMAIL FROM:<a@example.org>\r\nQUIT\r\n")
            self.assertEqual(client.line()[:4], "220 ")
            with trusting().wrap_socket(client.socket, server_hostname="localhost") as inside:
                login = b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n"
                inside.sendall(b"NOOP\r\nMAIL FROM:<a@example.org>\r\n" + login + b"HELO x\r\n"
                               + login + b"QUIT\r\n")
                replies = b"".join(iter(lambda: inside.recv(1000), b"")).splitlines()
        self.assertEqual([line[:9] for line in replies], [
            b"250 2.0.0", b"503 5.5.1", b"503 5.5.1", b"250 local", b"503 5.5.1", b"221 2.0.0"])

    def test_a_client_that_leaves_in_mid_data_delivers_nothing(self):
        process, address = self.serve(*self.tls_files)
        for way in "with TLS's farewell", "without":
            client = self.connect(address)
            client.login("joe", "secret")
            client.mail("a@example.org")
            client.rcpt("b@example.org")
            client.docmd("DATA")
            client.send(b"Subject: hi\r\n\r\nhalf a mail\r\n.\r")
            if way != "without":
                with contextlib.suppress(OSError):      # the server does not answer in kind
                    client.sock.unwrap()
            client.close()
        wait_for(lambda: self.logged().count("left in mid-transaction") == 2, "the sessions to end")
        self.assertEqual(self.delivered(), [])

    def test_old_versions_are_refused(self):
        # A hello of TLS 1.1, as today's clients can hardly be brought to send one.
        body = b"\x03\x02" + bytes(32) + b"\x00" + b"\x00\x04\xc0\x09\xc0\x13" + b"\x01\x00"
        hello = b"\x01" + struct.pack(">I", len(body))[1:] + body
        process, address = self.serve(*self.tls_files, "--tls-starttls=off")
        with Client(address) as client:
            client.send(b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello)
            self.assertRegex(client.file.read(), rb"(?s)\A\x15\x03.\x00\x02\x02\x46\Z")
        wait_for(lambda: "TLS handshake failed: " in self.logged(), "a line in the log")

    def test_no_renegotiation(self):
        context = msmtpd._tls_context(self.write("both", CERTIFICATE_1 + KEY_1), None)
        self.assertTrue(context.options & ssl.OP_NO_RENEGOTIATION)

    @unittest.skipUnless(getattr(ssl, "HAS_TLSv1_3", False), "no TLS 1.3")
    def test_nothing_comes_unasked_behind_the_handshake(self):
        """Such as tickets, of which libesmtp takes the arrival for that of a reply."""
        process, address = self.serve()
        client = self.connect(address)
        self.assertEqual(client.sock.version(), "TLSv1.3")
        self.assertEqual(client.noop()[0], 250)     # before which they would have been read
        self.assertFalse(client.sock.session.has_ticket)

    def test_handshake_takes_a_slot_and_is_under_the_limit(self):
        for way, before in ("on", ("EHLO client.example", "STARTTLS")), ("off", ()):
            with self.subTest(starttls=way):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.log)
                process, address = self.serve(*self.tls_files, "--tls-starttls=" + way,
                                              "--timeout=0.2", "--max-sessions=1")
                with Client(address) as mute, Client(address) as waiting:
                    if before:
                        mute.reply()
                        mute.do(*before)
                    else:
                        mute.send(b"\x16")
                    self.assertFalse(select.select([waiting.socket], (), (), 0)[0])
                    since = time.monotonic()
                    self.assertEqual(mute.rest(), "")   # no words where TLS is awaited
                    self.assertLess(time.monotonic() - since, 5)    # 10 would be the full rule's
                    wait_for(lambda: "session 2: connect" in self.logged(), "the slot to be free")

    @unittest.skipUnless(os.path.exists("/dev/fd"), "no /dev/fd")
    def test_a_key_from_a_pipe(self):
        """As from gpg -d, by way of bash."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.write(writer, KEY_1.encode())
        os.close(writer)
        done = self.run_program(
            "--inetd", "--tls-cert-file=" + self.write("certificate", CERTIFICATE_1),
            "--tls-key-file=/dev/fd/%d" % reader, input=b"EHLO x\r\nQUIT\r\n", pass_fds=[reader])
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"STARTTLS\r\n", done.stdout)

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
                options = ["--tls-%s-file=%s" % (name, os.path.join(self.folder, value))
                           for name, value in (("cert", certificate), ("key", key)) if value]
                done = self.run_program("--port=0", *options)
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: .*%s.*\n\Z" % says)

    def test_hangup_loads_the_certificate_anew(self):
        both = self.write("both", CERTIFICATE_1 + KEY_1)
        process, address = self.serve("--tls-cert-file=" + both)
        before = self.connect(address)
        self.write("both", CERTIFICATE_2 + KEY_1)       # a renewal that went wrong
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "kept the certificate: " in self.logged(), "a line in the log")
        self.connect(address)
        self.write("both", CERTIFICATE_2 + KEY_2)
        process.send_signal(signal.SIGHUP)

        def renewed():
            try:
                return self.connect(address, CERTIFICATE_2)
            except ssl.SSLError:
                return None
        client = wait_for(renewed, "the new certificate")
        for each in before, client:
            each.login("joe", "secret")
            self.post_by(each, "ESMTPSA")

    def test_under_inetd(self):
        for way in "on", "off":
            with self.subTest(starttls=way):
                mine, its = socket.socketpair()
                process = self.spawn(
                    sys.executable, PROGRAM, "--inetd", "--command=%s -f %%F --" % self.capture,
                    "--tls-starttls=" + way, *self.tls_files, stdin=its, stdout=its)
                its.close()
                mine.settimeout(PATIENCE)
                client = smtplib.SMTP()
                client.sock = mine
                if way == "off":
                    client.sock = trusting().wrap_socket(mine, server_hostname="localhost")
                self.assertEqual(client.getreply()[0], 220)
                if way == "on":
                    client._host = "localhost"      # which smtplib compares with the certificate
                    client.starttls(context=trusting())
                self.post_by(client, "ESMTPS", source="")
                self.assertEqual(process.wait(PATIENCE), 0)


class Queue(PeerCase):
    """Postfix behind the program: it keeps what cannot be sent now."""

    def postfix(self, upstream):
        """Start Postfix in a folder of its own, without a listener; return sendmail's command."""
        root = os.environ.get("POSTFIX_ROOT", "/")
        self.need("postqueue", "postdrop", "sendmail", where=os.path.join(root, "usr/sbin"))
        programs = os.path.join(root, "usr/sbin")
        daemons = [path for path in (os.path.join(root, "usr/lib/postfix/sbin"),
                                     os.path.join(root, "usr/libexec/postfix"))
                   if os.path.exists(os.path.join(path, "master"))]
        if not daemons:
            self.skipTest("no postfix")
        if os.getuid():
            self.skipTest("no postfix without root")
        owner = next(pwd.getpwnam(name) for name in ("postfix", "uucp", "daemon")
                     if name in {user.pw_name for user in pwd.getpwall()})
        group = next(entry for entry in grp.getgrall() if entry.gr_name in ("postdrop", "staff"))
        os.chmod(self.folder, 0o755)
        for name in ("conf data q q/incoming q/active q/deferred q/bounce q/defer q/corrupt "
                     "q/flush q/hold q/maildrop q/pid q/private q/public q/saved q/trace").split():
            os.mkdir(os.path.join(self.folder, name), 0o755 if name in ("conf", "q") else 0o700)
            if name not in ("conf", "q", "q/pid"):
                os.chown(os.path.join(self.folder, name), owner.pw_uid, -1)
        for name, mode in ("maildrop", 0o730), ("public", 0o710):
            os.chown(os.path.join(self.folder, "q", name), -1, group.gr_gid)
            os.chmod(os.path.join(self.folder, "q", name), mode)
        self.write("conf/main.cf", MAIN_CF.format(
            folder=self.folder, programs=programs, daemons=daemons[0], owner=owner.pw_name,
            group=group.gr_name, libraries=os.path.dirname(daemons[0]), upstream=upstream))
        self.write("conf/master.cf", MASTER_CF)
        for name in "conf/main.cf", "conf/master.cf":
            os.chmod(os.path.join(self.folder, name), 0o644)
            os.utime(os.path.join(self.folder, name), (0, 0))   # Postfix waits where it is new
        self.home["MAIL_CONFIG"] = os.path.join(self.folder, "conf")
        self.home["LD_LIBRARY_PATH"] = os.environ.get("LD_LIBRARY_PATH", "")
        master = self.spawn(os.path.join(daemons[0], "master"), "-d", "-c",
                            self.home["MAIL_CONFIG"], stderr=subprocess.DEVNULL,
                            start_new_session=True)
        self.addCleanup(self.end_group, master)
        wait_for(lambda: os.path.exists(os.path.join(self.folder, "q/public/pickup")), "Postfix")
        return programs

    @staticmethod
    def end_group(process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def test_postfix_keeps_mail_while_the_upstream_is_down(self):
        port, mails = free_port(), []
        programs = self.postfix(port)
        process = self.start("--command=%s/sendmail -i -f %%F --" % programs, env=self.home)
        client = smtplib.SMTP(process.host, process.port, timeout=PATIENCE)
        self.addCleanup(client.close)
        for _ in range(3):
            client.sendmail("a@example.org", ["b@example.org", "c@example.org"],
                            LETTER.replace(b"\n", b"\r\n"))

        def queue():
            return self.peer(os.path.join(programs, "postqueue"), "-p")
        wait_for(lambda: queue().count("Connection refused") == 3, "three mails to be deferred")
        with msmtpd.Server(mails.append, port=port):
            self.peer(os.path.join(programs, "postqueue"), "-f")
            wait_for(lambda: len(mails) == 3, "the mails")
            wait_for(lambda: "queue is empty" in queue(), "an empty queue")
        for mail in mails:
            self.assertEqual((mail.sender, sorted(mail.recipients)),
                             ("a@example.org", ["b@example.org", "c@example.org"]))
            self.assertTrue(mail.data.endswith(LETTER))


MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {folder}/q
data_directory = {folder}/data
command_directory = {programs}
daemon_directory = {daemons}
shlib_directory = {libraries}
mail_owner = {owner}
setgid_group = {group}
default_privs = nobody
myhostname = localhost
mydestination =
relayhost = [127.0.0.1]:{upstream}
inet_interfaces = loopback-only
inet_protocols = ipv4
import_environment = MAIL_CONFIG LD_LIBRARY_PATH
export_environment = MAIL_CONFIG LD_LIBRARY_PATH
alias_maps =
alias_database =
maillog_file = {folder}/postfix.log
maillog_file_prefixes = /
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtp_tls_security_level = none
in_flow_delay = 0
minimal_backoff_time = 1s
maximal_backoff_time = 1s
queue_run_delay = 1s
"""
MASTER_CF = """\
pickup unix n - n 1 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 1 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
smtp unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
showq unix n - n - - showq
flush unix n - n 1000? 0 flush
postlog unix-dgram n - n - 1 postlogd
"""


class MainJob(PeerCase):
    """Mail in by SMTP with a login, out through msmtp, to a server upstream."""

    def test_each_mail_arrives_once_and_unchanged(self):
        self.need("msmtp")
        mails = []
        upstream = msmtpd.Server(mails.append,
                                 authenticate=lambda *login: login == ("me", "upstream"))
        upstream.start()
        self.addCleanup(upstream.stop)
        rc = self.write("msmtprc", "account default\nhost 127.0.0.1\nport %d\ntls off\nauth plain\n"
                        "user me\npassword upstream\n" % upstream.port)
        daemon = self.start("--auth=joe,echo secret", "--command=msmtp --file=%s -f %%F --" % rc,
                            env=self.home)
        big = LETTER.replace(b"Content-Transfer-Encoding: 8bit\n\n", (
            b"Content-Transfer-Encoding: base64\nContent-Disposition: attachment\n\n"
            + base64.encodebytes(bytes(range(256)) * 87000)))
        self.assertGreater(len(big), 30000000)
        many = ["r%d@example.org" % number for number in range(200)]
        two = ["b@example.org", "c@example.org"]

        def by_smtplib(recipients, letter):
            with smtplib.SMTP(daemon.host, daemon.port, timeout=PATIENCE) as client:
                client.login("joe", "secret")
                client.sendmail("a@example.org", recipients, letter.replace(b"\n", b"\r\n"))

        def by_program(words, recipients, letter):
            self.peer(*shlex.split(words.format(
                port=daemon.port, letter=self.write("letter", letter[:-1]),    # it adds an end
                recipients=" ".join(recipients), list=",".join(recipients),
                options=" ".join("--mail-rcpt " + recipient for recipient in recipients))),
                data=letter)

        clients = {
            "msmtp": "msmtp --host=127.0.0.1 --port={port} --auth=plain --user=joe "
                     "--passwordeval='echo secret' --from=a@example.org -- {recipients}",
            "swaks": "swaks --server 127.0.0.1 --port {port} --auth PLAIN --auth-user joe "
                     "--auth-password secret --from a@example.org --data @{letter} "
                     "--suppress-data --pipeline --to {list}",
            "curl": "curl --silent --show-error --user joe:secret --crlf --upload-file - "
                    "smtp://127.0.0.1:{port}/client.example --mail-from a@example.org {options}",
            "smtplib": None,
        }
        for (name, words), (recipients, letter) in itertools.product(
                clients.items(), ((two, LETTER), (many, LETTER), (two, big))):
            if words and not shutil.which(name, path=self.home["PATH"]):
                continue
            if letter is big and name != "curl":        # one is enough
                continue
            send = functools.partial(by_program, words) if words else by_smtplib
            with self.subTest(client=name, recipients=len(recipients), size=len(letter)):
                send(recipients, letter)
                arrived = mails.pop()
                self.assertEqual(mails, [])
                self.assertEqual((arrived.sender, arrived.recipients),
                                 ("a@example.org", recipients))
                self.assertRegex(arrived.data[:200], rb"\AReceived: from \S+ \(\[127\.0\.0\.1\]\)\n"
                                 rb"\tby localhost \(msmtpd\) with ESMTPA;\n\t.*\n")
                if without_trace(arrived.data) != letter:       # said short, as one is of 30 MB
                    self.fail("another mail arrived: %d bytes" % arrived.size)


class People(ProgramCase):
    """What people meet first: the help, and the words about a mistake."""

    def test_help_fits_a_screen_and_names_the_defaults(self):
        text = self.run_program("--help").stdout.decode()
        self.assertLessEqual(len(text.splitlines()), 50)
        self.assertLess(max(map(len, text.splitlines())), 80)
        for option, default in (
                ("interface=IP", "127.0.0.1"), ("port=NUMBER", "25"),
                ("log=none|syslog|FILE", "none"), ("command=CMD", "msmtp -f %F --"),
                ("received=on|off", "on"), ("max-size=BYTES", "64M"),
                ("max-sessions=NUMBER", "16"), ("timeout=SECONDS", "300"),
                ("delivery-timeout=SECONDS", "540"), ("tls-starttls=on|off", "on")):
            with self.subTest(option=option):
                self.assertRegex(" ".join(text.split()), r"--%s [^()]*\(%s\)" % (
                    re.escape(option).replace("=", "[= ]"), re.escape(default)))

    def test_a_mistyped_option_names_the_nearest(self):
        for typed, meant in (("--comand=x", "command"), ("--recieved=off", "received"),
                             ("--intreface=::1", "interface"), ("--ports=25", "port"),
                             ("--tls-cert=x --inted", "inetd"),
                             ("--certificate=x", "tls-cert-file"),
                             ("--max-size=1M --time-out=5", "timeout")):
            with self.subTest(typed=typed):
                done = self.run_program(*typed.split())
                self.assertEqual(done.returncode, 3)
                self.assertRegex(done.stderr.decode(), r"\Amsmtpd: .*%s.* --%s\b.*\n\Z"
                                 % (re.escape(typed.split()[-1].partition("=")[0]), meant))


TRANSACTION = ("EHLO client.example\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\n"
               "DATA\r\nSubject: cut\r\n\r\n..one\r\n.\r\n")
CUT_DATA = b"Subject: cut\n\n.one\n"


class CutAnywhere(ServerCase):
    """A client that leaves delivers nothing before the end of data and once after it."""

    def cut(self, leave, step_by_step):
        """Leave after each byte of a transaction; return the numbers of mails, one for each."""
        server = self.serve()
        lines = re.findall(r".*\n", TRANSACTION)
        data_line = lines.index("DATA\r\n")
        counts = []
        for length in range(len(TRANSACTION) + 1):
            before = len(self.mails)
            client = Client(server)
            client.reply()
            rest = TRANSACTION[:length]
            for number, line in enumerate(lines):
                if rest:
                    client.send(rest[:len(line)])
                if step_by_step and len(rest) >= len(line) and number <= data_line:
                    client.reply()
                rest = rest[len(line):]
            if length == len(TRANSACTION):
                # Its bytes have arrived once the mail has; an earlier RST might overtake them.
                wait_for(lambda: self.mails, "the mail")
            leave(client)
            counts.append(before)
        server.stop()           # waits for every session
        counts.append(len(self.mails))
        return [after - before for before, after in zip(counts, counts[1:])]

    def test_leaving_after_each_byte(self):
        expected = [0] * len(TRANSACTION) + [1]
        for leave in (Client.close, Client.reset):
            for step_by_step in (True, False):
                with self.subTest(leave=leave.__name__, step_by_step=step_by_step):
                    self.assertEqual(self.cut(leave, step_by_step), expected)
                    self.assertEqual([mail.data for mail in self.mails], [CUT_DATA])

    def test_leaving_right_behind_the_end_of_data(self):
        server = self.serve()
        head, tail = TRANSACTION.split("DATA\r\n")
        for leave, in_one_piece in itertools.product((Client.close, Client.reset), (False, True)):
            with self.subTest(leave=leave.__name__, in_one_piece=in_one_piece):
                client = Client(server)
                client.reply()
                if not in_one_piece:
                    client.do(*head.splitlines(), "DATA")
                client.send(TRANSACTION if in_one_piece else tail)
                leave(client)
                wait_for(lambda: self.mails, "the mail")
                self.assertEqual([mail.data for mail in self.mails], [CUT_DATA])
                self.mails.clear()

    def test_half_closed_connections_get_their_replies(self):
        server = self.serve()
        with Client(server) as client:
            client.send(TRANSACTION)
            client.socket.shutdown(socket.SHUT_WR)
            self.assertTrue(client.rest().endswith("\r\n250 2.0.0 Delivered\r\n"))
        self.assertEqual(len(self.mails), 1)

    def test_pieces_do_not_change_the_outcome(self):
        whole = TRANSACTION.encode() + TRANSACTION.encode() + b"QUIT\r\n"
        rng = random.Random(5321)
        cuts = [[], range(1, len(whole)), [m.end() for m in re.finditer(rb"\n", whole)][:-1]]
        cuts += [sorted(rng.sample(range(1, len(whole)), 20)) for _ in range(20)]
        outcomes = set()
        for cut in cuts:
            server = self.serve()
            with Client(server) as client:
                for start, end in zip([0, *cut], [*cut, len(whole)]):
                    client.send(whole[start:end])
                outcomes.add((client.rest(), repr([vars_of(mail) for mail in self.mails])))
            server.stop()
        self.assertEqual(len(outcomes), 1)
        self.assertEqual(self.mails[1].data, CUT_DATA)


SECOND = b"MAIL FROM:<evil@example.org>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nsmuggled\r\n"

# What other servers have taken for the end of data, and what it is: lines of the mail.
NO_ENDS = [
    (b"\n.\n", b"\n\n"), (b"\r\n.\n", b"\n\n"), (b"\n.\r\n", b"\n\n"),
    (b"\r.\r", b" . "), (b"\r\n.\r", b"\n "), (b"\r.\r\n", b" .\n"), (b"\r.\n", b" .\n"),
    (b"\n.\r", b"\n "), (b"\r\n\0.\r\n", b"\n\0.\n"), (b"\r\n.\0\r\n", b"\n\0\n"),
    (b"\r\n.\r\0\n", b"\n \0\n"), (b"\r\0\n.\r\n", b" \0\n\n"), (b"\r\n. \r\n", b"\n \n"),
    (b"\r\n .\r\n", b"\n .\n"), (b"\r\n.\r\r\n", b"\n \n"), (b"\r\r\n.\n", b" \n\n"),
    (b"\r\n..\r\n", b"\n.\n"), (b"\n\n.\n\n", b"\n\n\n\n"), (b"\r\n.\t\r\n", b"\n\t\n"),
    (b"\r\n\xe2\x80\x8b.\r\n", b"\n\xe2\x80\x8b.\n"), (b"\x85.\x85", b"\x85.\x85"),
]


class Smuggling(ServerCase):
    """A line that only looks like the end of data is text, and so is the mail behind it."""

    def opened(self, server):
        client = self.client(server)
        client.open("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")
        return client

    def test_only_one_end_of_data(self):
        server = self.serve()
        for variant, text in NO_ENDS:
            with self.subTest(variant=variant):
                with self.opened(server) as client:
                    client.send(b"one" + variant + SECOND + b".\r\nQUIT\r\n")
                    self.assertRegex(client.rest(), r"\A250 2\.0\.0 .*\r\n221 .*\r\n\Z")
                self.assertEqual([mail.data for mail in self.mails],
                                 [b"one" + text + SECOND.replace(b"\r\n", b"\n")])
                self.mails.clear()

    def test_borders_of_buffers(self):
        server = self.serve()
        with self.opened(server) as client:
            for size, shift in itertools.product((1023, 1024, 4096, 65536), range(-5, 3)):
                for variant, text in NO_ENDS[:8]:
                    body = b"x" * (size + shift) + variant
                    with self.subTest(size=size, shift=shift, variant=variant):
                        client.send(body + SECOND)
                        client.send(b".\r\n")
                        self.assertEqual(client.reply(), ["250 2.0.0 Delivered"])
                        data = self.mails.pop().data
                        self.assertTrue(data.startswith(b"x" * (size + shift) + text + b"MAIL"))
                        self.assertEqual(self.mails, [])
                        client.do("MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA")

    def test_end_of_data_in_pieces(self):
        """Cut by a receive of one's own: the kernel may put together what was sent in pieces."""
        slots = msmtpd.Slots(*socket.socketpair())
        self.addCleanup(slots.close)
        strict, lenient = (b"\r\n.\r\n",), (b"\r\n.\r\n", b"\n.\n")
        for before, sent, ends, body in (
                (b"\r\n", b"a.\n.\r\n..\r\n.\r\n", strict, b"a.\n.\r\n..\r\n"),
                (b"\r\n", b".\r\n", strict, b""), (b"\r\n", b"\r\n.\r\n", strict, b"\r\n"),
                (b"\n", b"..\n.\n", lenient, b"..\n"), (b"\n", b".\n", lenient, b""),
                (b"\n", b"x\r\n.\r\n", lenient, b"x\r\n"), (b"\n", b"x\r\n.\n", lenient, b"x\r\n")):
            sent += b"NOOP\r\n.\r\n"       # of which the end is one, too, but not the first
            for cuts in itertools.combinations(range(1, len(sent)), 3):
                places = (0, *cuts, len(sent))
                pieces = [sent[a:b] for a, b in zip(places, places[1:])]
                wire = msmtpd.Wire(0, 0, lambda size: pieces.pop(0), len, print, slots, PATIENCE)
                said = b"".join(wire.read_mail_data(before, ends))
                self.assertEqual((said, wire.read_line(100)), (body, (b"NOOP", b"\r\n")), cuts)

    def test_one_line_end_with_cr_is_enough_to_be_strict(self):
        lines = ["EHLO a", "MAIL FROM:<a@example.org>", "RCPT TO:<b@example.org>", "DATA"]
        for strict in range(len(lines)):
            with self.subTest(line=lines[strict]), Client(self.serve()) as client:
                client.send("".join(line + ("\r\n" if number == strict else "\n")
                                    for number, line in enumerate(lines)))
                client.send("one\n.\nNOOP\n")
                client.socket.shutdown(socket.SHUT_WR)
                self.assertNotIn("Delivered", client.rest())
                self.assertEqual(self.mails, [])


# Local parts that mean something to a shell. Some are addresses only between quotes.
HOSTILE = ["`touch${IFS}HIT`", "a|touch${IFS}HIT", "a&touch${IFS}HIT&",
           "a'b", "a*", "~root", "{touch}", "#a", "!a", "$HOME", "a&&b", "a^b", "?",
           '"$(touch HIT)"', '"$(touch${IFS}HIT)"',
           '"`touch HIT`"', '";touch HIT;"', '"|touch HIT"', '">HIT"', '"<HIT"',
           '"\\"; touch HIT; \\""', '"a\' ; touch HIT; \'b"', '"-f"', '"a b"', '"%F"']
HYPHENS = ["-f", "--help", "-oQHIT", "-"]
PLAIN = ["o'brien", "r&d"]


NOTE = """\
#!/bin/sh
# Notes its arguments, one a line and an empty line behind them, faster than the script for mails.
{ printf '%s\\n' "$@"; echo; } >> "${0%/*}/noted"
"""


class Injection(ProgramCase):
    """Whatever the command line looks like, an address is never code and never an option."""

    def commands(self):
        """The command lines, and whether what means something to a shell gets through."""
        fake = self.script("ssh", '#!/bin/sh\nshift\nexec sh -c "$*"\n')    # as the real one
        keep = self.script("keep", NOTE)
        return [
            ("%s -f %%F --" % keep, True), ("%s --from=%%F --" % keep, True),
            ("%s -f%%F --" % keep, True), ("%s --" % keep, True),
            ("%s -f '%%F' --" % keep, True), ('%s -f "%%F" --' % keep, True),
            ("%s -f '<%%F>' --" % keep, False), ('%s -f "x%%F" --' % keep, False),
            ("X=1 %s -f %%F --" % keep, False), ("X=1 %s -f '%%F' --" % keep, False),
            ('X=1 %s -f "%%F" --' % keep, False), ("X=`echo %%F` %s --" % keep, False),
            ("sh -c '%s -f %%F -- \"$@\"' sh" % keep, False),
            ("sh -c '%s -f \"$0\" -- \"$@\"' %%F" % keep, False),
            ("env sh %s -f %%F --" % keep, False),
            ("%s host %s -f %%F --" % (fake, keep), False),
            ("env A=b %s -f %%F --" % keep, True),
        ]

    def hold(self, client, lets_by):
        """Offer all addresses; return those that were let by, as the command must have got them."""
        passed = []
        for local in HOSTILE + PLAIN:
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
        for local in HYPHENS:       # an option of no command
            self.assertRegex(client.do("MAIL FROM:<%s@x.org>" % local), r"\A501 5\.1\.7 ")
            reply = client.do("MAIL FROM:<a@example.org>", "RCPT TO:<%s>" % local)
            self.assertRegex(reply, r"\A501 5\.1\.3 ")
            client.do("RSET")
        # What is inert passes everywhere.
        self.assertEqual(client.do("MAIL FROM:<a+b=%F%F@x.org>", "RCPT TO:<root>",
                                   "RCPT TO:<%F@x.org>", "DATA", "x\r\n.")[:3], "250")
        return passed

    def test_nothing_is_executed(self):
        noted = os.path.join(self.folder, "noted")
        for command, lets_by in self.commands():
            with self.subTest(command=command):
                with self.server(command) as server, Client(server) as client:
                    client.open()
                    passed = self.hold(client, lets_by)
                with open(noted, encoding="utf-8") as file:
                    mails = [text.split("\n") for text in file.read()[:-2].split("\n\n")]
                os.unlink(noted)
                self.assertEqual([words[-1] for words in mails], [*passed, "%F@x.org"])
                self.assertEqual(mails[-1][-2:], ["root", "%F@x.org"])
                for path, words in zip(passed, mails):
                    self.assertIn(words[:-1], (["-f", path, "--"], ["-f" + path, "--"],
                                               ["--from=" + path, "--"], ["--"]))
                self.assertEqual([name for _, folders, files in os.walk(self.folder)
                                  for name in folders + files if "HIT" in name], [])
                self.assertFalse(os.path.exists("HIT"))

    def server(self, command):
        """A server in this process, which costs less than a program, on the command."""
        return msmtpd.Server(msmtpd.Command(command))

    def test_addresses_are_utf_8_in_every_locale(self):
        # In Big5 the second byte of this letter is |, which a shell would see.
        for command in ("X=1 %s -f %%F --", "%s -f %%F --"):
            deliver = msmtpd.Command(command % self.capture)
            mail = msmtpd.Mail("\u56dbx", ["\u56dbx"], b"x\n", smtputf8=True)
            with mock.patch("os.fsencode", lambda text: (
                    text if isinstance(text, bytes) else text.encode("big5"))):
                deliver(mail)
            with self.subTest(command=command):
                self.assertEqual(self.delivered()[-1][0], ["-f", "\u56dbx", "--", "\u56dbx"])


MAIL_IN_HTTP = ("EHLO a\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n"
                "from a web page\r\n.\r\nQUIT\r\n")
REQUEST = "%s / HTTP/1.1\r\nHost: localhost:25\r\nContent-Type: text/plain\r\n\r\n" + MAIL_IN_HTTP

FOREIGN = [     # what comes, what is answered, what the log says
    (REQUEST % "POST", "421 4.7.0 ", "spoke HTTP"), (REQUEST % "post", "421 4.7.0 ", "spoke HTTP"),
    (REQUEST % "CONNECT", "421 4.7.0 ", "spoke HTTP"),
    (REQUEST % "X-NEW", "421 4.7.0 ", "spoke HTTP"),
    ("NOOP\r\n" + REQUEST % "PUT", "421 4.7.0 ", "spoke HTTP"),
    ("NOOP\r\nGET /" + "x" * 3000 + " HTTP/1.1\r\n" + MAIL_IN_HTTP, "421 4.7.0 ", "spoke HTTP"),
    ("NOOP\r\nAUTH /\xe9 HTTP/1.1\r\n" + MAIL_IN_HTTP, "421 4.7.0 ", "spoke HTTP"),
    ("Host: localhost\r\n" + MAIL_IN_HTTP, "421 4.7.0 ", "spoke HTTP"),
    ("GET /" + "x" * 20000 + " HTTP/1.1\r\n" + MAIL_IN_HTTP, "421 4.7.0 ", "spoke HTTP"),
    ("POST /" + "x" * 70000 + " HTTP/1.1\r\n" + MAIL_IN_HTTP, "421 4.7.0 ", "spoke HTTP"),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n" + MAIL_IN_HTTP.encode(), "", "TLS"),
    (bytes(range(128, 256)) * 600, "421 4.5.2 ", "endless line"),
    (b"\0" * 66000, "421 4.5.2 ", "endless line"),
    (b"\x80\r\n\xff\n" * 6 + MAIL_IN_HTTP.encode(), "421 4.7.0 ", "closed: "),
]


class CrossProtocol(ServerCase):
    """Who speaks something else delivers nothing, and can read why."""

    def test_foreign_protocols(self):
        for (data, answer, logged), pieces in itertools.product(FOREIGN, (1, 7, 100)):
            data = data.encode() if isinstance(data, str) else data
            with self.subTest(data=data[:40], pieces=pieces), self.assertLogs("msmtpd") as log:
                server = self.serve()
                with Client(server) as client:
                    self.assertEqual(client.line()[:4], "220 ")
                    size = -(-len(data) // pieces)
                    for start in range(0, len(data), size):
                        try:
                            client.send(data[start:start + size])
                        except ConnectionError:     # it closes while more comes
                            break
                    # Nothing may be said to who speaks TLS, so that one may see a reset.
                    said = client.rest() or ""
                self.assertEqual("\n".join(said.splitlines()[-1:])[:10], answer)
                self.assertNotIn("\n354", "\n" + said)
                server.stop()
                self.assertEqual(self.mails, [])
                self.assertIn(logged, "\n".join(log.output))

    def test_replies_are_sent_once(self):
        """Ten errors in one piece: ten replies, on descriptors as on a socket."""
        errors = b"nonsense\r\n" * 12
        expected = ["220"] + ["500"] * 9 + ["421"]
        with Client(self.serve()) as client:
            client.send(errors)
            self.assertEqual([line[:3] for line in client.rest().splitlines()], expected)
        done = subprocess.run([sys.executable, msmtpd.__file__, "--inetd", "--command=true"],
                              input=errors, stdout=subprocess.PIPE, timeout=20, check=False)
        self.assertEqual([line[:3].decode() for line in done.stdout.splitlines()], expected)


class Secrets(ProgramCase):
    """The password is nowhere but in the memory of the program."""

    SECRET = "pa55-in-no-log"

    def spellings(self):
        """The password as it may show, the base64 of it in each of its three phases."""
        yield self.SECRET
        for padding in range(3):
            coded = base64.b64encode(b"x" * padding + self.SECRET.encode()).decode()
            yield coded[4 if padding else 0:-4]

    def test_password_is_in_no_log_environment_or_argument(self):
        spy = self.script("spy", "#!/bin/sh\n{ env; tr '\\0' '\\n' </proc/$$/cmdline; "
                                 "tr '\\0' '\\n' </proc/$PPID/cmdline; "
                                 "tr '\\0' '\\n' </proc/$PPID/environ; } >>%s 2>&1\n"
                                 "echo failing >&2; exit 1\n" % os.path.join(self.folder, "seen"))
        source = os.path.join(self.folder, "password")
        with open(source, "w", encoding="ascii") as file:
            file.write(self.SECRET + "\n")
        process = self.start("--debug", "--auth=user,cat " + source, "--command=%s --" % spy)
        plain = base64.b64encode(("\0user\0" + self.SECRET).encode()).decode()
        user, word = (base64.b64encode(text.encode()).decode() for text in ("user", self.SECRET))
        for lines in (["AUTH PLAIN " + plain], ["AUTH PLAIN", plain], ["auth  plain  " + plain],
                      ["AUTH LOGIN", user, word], ["AUTH LOGIN " + user, word],
                      ["AUTH PLAIN " + plain[:-3] + "*"], ["AUTH LOGIN", user, "*", word],
                      ["AUTH " + plain, plain, word, self.SECRET],
                      ["HELO a", "AUTH PLAIN " + plain],
                      ["AUTH PLAIN " + plain, "MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA",
                       "x\r\n."]):
            with Client(process) as client:
                client.open(*lines)
        self.assertEqual(self.stop(process)[0], 0)
        seen = self.logged()
        self.assertIn("authenticated as user", seen)
        self.assertIn("(hidden)", seen)
        with open(os.path.join(self.folder, "seen"), encoding="utf-8", errors="replace") as file:
            seen += file.read()
        self.assertIn("--debug", seen)
        for spelling in self.spellings():
            self.assertNotIn(spelling, seen)

    def test_password_is_in_no_traceback(self):
        def authenticate(user, password):
            raise ValueError("cannot look up %s" % password)
        with self.assertLogs("msmtpd", "DEBUG") as log, \
                msmtpd.Server(print, authenticate=authenticate) as server, \
                mock.patch.object(msmtpd, "AUTH_DELAY", 0.0), Client(server) as client:
            plain = base64.b64encode(("\0user\0" + self.SECRET).encode()).decode()
            self.assertEqual(client.open("AUTH PLAIN " + plain)[:9], "454 4.7.0")
        for spelling in self.spellings():
            self.assertNotIn(spelling, "\n".join(log.output))


if __name__ == "__main__":
    unittest.main()
