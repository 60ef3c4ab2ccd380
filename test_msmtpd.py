# SPDX-License-Identifier: MIT
"""Tests of msmtpd.py, in the order of its manual and of RFC 5321: run `python3 -m unittest`.

They need nothing but Python and a POSIX system, listen on free ports of 127.0.0.1 only, and skip
by name where a program that they talk to is missing.
"""

import base64
import contextlib
import io
import itertools
import os
import random
import re
import resource
import select
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
from unittest import mock

import msmtpd

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "msmtpd.py")
PATIENCE = 20       # seconds that a test waits for what should come at once


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
        with tempfile.TemporaryFile() as errors:
            before = os.dup(2)
            os.dup2(errors.fileno(), 2)
            try:
                status = msmtpd.main(arguments)
            finally:
                os.dup2(before, 2)
                os.close(before)
            errors.seek(0)
            return status, errors.read().decode()

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
        ("FROM:<a@my_host>", "a@my_host", ""),
        ("FROM:<o'brien+tag@example.org>", "o'brien+tag@example.org", ""),
        ("FROM:<!#$%&'*+/=?^_`{|}~-@example.org>", "!#$%&'*+/=?^_`{|}~-@example.org", ""),
        ("FROM:<\u00fc@\u00fc.example>", "\u00fc@\u00fc.example", ""),
        ("FROM:<a%b.example@c.example>", "a%b.example@c.example", ""),
    )
    BAD = (
        "FROM:", "FROM: ", "FROM:<", "FROM:>", "FROM:<a@b", "FROM:a@b>", "FROM:<a b@c>",
        "FROM:<a@b c>", "FROM:<@example.org>", "FROM:<a@>", "FROM:<a@@b>", "FROM:<a@b@c>",
        "FROM:<a@.b>", "FROM:<a@b.>", "FROM:<a@b..c>", "FROM:<a@-b>", "FROM:<a@b->",
        "FROM:<-a@b>", "FROM:-oQ/tmp", "FROM:<@r.example:-a@b>", "FROM:<a@[1.2.3]>",
        "FROM:<a@[IPv6:xyz]>", "FROM:<a@[]>", 'FROM:<"a@b>', 'FROM:<"a"b@c>', "FROM:<a,b@c>",
        "FROM:<a@b>SIZE=1", "FROM:<a(comment)@b>", "FROM:<a\\b@c>", "FROM:<a;b@c>",
        "FROM:<a\u2028b@c>", "FROM:<a\xa0b@c>", "FROM:<a\u202eb@c>", "FROM:<<a@b>>",
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
        for character in " !\"#$&'()*;<>?[\\]^`{|}~\t\n\x7f\u00a0\u2028\u0301\u00d7":
            self.assertFalse(msmtpd.is_inert("a%sb@example.org" % character), repr(character))

    def test_parameters(self):
        for text, expected in (
                ("", {}), ("SIZE=1", {"SIZE": "1"}), ("size=1  BODY=8bitmime SMTPUTF8", {
                    "SIZE": "1", "BODY": "8bitmime", "SMTPUTF8": ""}),
                ("AUTH=<> ENVID=a+3Db", {"AUTH": "<>", "ENVID": "a+3Db"}),
                ("SIZE=", None), ("=1", None), ("SIZE=1=2", None), ("-X=1", None),
                ("SIZE=1 size=2", None), ("X=\x7f", None)):
            with self.subTest(text):
                self.assertEqual(msmtpd.parse_parameters(text), expected)


class TraceFields(unittest.TestCase):
    """The Received line: RFC 5321 4.4."""

    def test_received_line(self):
        for name, peer, protocol, begin in (
                ("a.example", msmtpd.Peer("192.0.2.1", 1), "ESMTP",
                 b"Received: from a.example ([192.0.2.1])\n\tby localhost (msmtpd) with ESMTP;\n\t"),
                ("unknown", msmtpd.Peer("fe80::1%eth0", 1), "SMTP",
                 b"Received: from unknown ([IPv6:fe80::1])\n\tby localhost (msmtpd) with SMTP;\n\t"),
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
                (msmtpd.Reply(451, "4.3.0", "a\r\nb\0\u00fc\t"), b"451 4.3.0 a  b?? \r\n")):
            self.assertEqual(bytes(reply), expected)

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

    def test_end_of_input_without_quit(self):
        server = self.serve()
        with Client(server) as client:
            client.send(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\nNOOP")
            client.socket.shutdown(socket.SHUT_WR)
            self.assertTrue(client.rest().endswith("250 2.0.0 Delivered\r\n"))
        self.assertEqual([mail.data for mail in self.mails], [b"x\n"])

    def test_http_is_shut_out(self):
        mail = b"\r\n\r\nEHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n"
        for first in (b"POST / HTTP/1.1\r\nHost: x", b"GET /", b"put /x HTTP/1.1", b"Host: x",
                      b"FROBNICATE / HTTP/1.1", b"CONNECT a:1 HTTP/1.1", b"OPTIONS * HTTP/1.0",
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
            client.open("MAIL FROM:<a@b>", "RCPT TO:<1234567@d>")
            self.assertEqual(client.do("RCPT TO:<c@d>")[:9], "452 4.5.3")
            self.assertEqual(client.do("RCPT TO:<c>")[:3], "250")
            self.assertEqual(client.do("RSET", "MAIL FROM:<a@b>", "RCPT TO:<123456@d>")[:3], "250")

    def test_size(self):
        with Client(self.serve(max_size=1000)) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            for size, code in ((1000, "250 2.0.0"), (1001, "552 5.3.4"), (300000, "552 5.3.4"),
                               (1000, "250 2.0.0")):
                self.assertEqual(client.do("x" * (size - 2) + "\r\n.")[:9], code)
                client.do("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
        self.assertEqual([mail.size for mail in self.mails], [999, 999])

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
        with self.subTest("mail data"), Client(server) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("x\r\n")
            self.assertEqual(client.rest()[:9], "421 4.4.2")
        self.assertEqual(self.mails, [])

    def test_slow_clients(self):
        def drip(client, seconds=0.05):
            """Send a byte now and then until the server has had enough."""
            with contextlib.suppress(ConnectionError):
                while not select.select([client.socket], [], [], seconds)[0]:
                    client.send("x")
        server = self.serve(timeout=0.4)
        with self.subTest("line"), Client(server) as client:
            client.open()
            drip(client)
            self.assertEqual(client.rest()[:9], "421 4.4.2")
        with self.subTest("mail data"), Client(server) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            drip(client)
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

    def test_bare_lf_session(self):
        for data, expected in (("x\r\n.\r\n", b"x\n"), ("x\r\n.\n", b"x\n"), (".\n", b""),
                               ("\n.\n", b"\n"), ("..\n.\n", b".\n"), ("x\n.y\n.\n", b"x\ny\n"),
                               (".\r\n", b"")):
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
              "bash -c 'cat \"$@\"' x", "cat %F; cat", "cat $HOME %F", "cat `true` %F", "cat %F | cat",
              "cat <x %F", "cat *", "cat ~ %F", "A=b cat %F", "cat # %F", "/usr/bin/ssh host cat %F",
              "nice ssh host", "cat --rsh=ssh %F", "cat -e 'ssh -x' %F", "xargs cat", "busybox sh",
              "su -c cat", "sudo cat %F", "cat \"$HOME\" %F", "nosuchprogram %F", "cat -f %F%F",
              "exec cat %F", "/bin/bash5.2 %F", "cat {a,b} %F", "cat && cat", "! cat")

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

    def test_no_command_takes_a_leading_hyphen(self):
        with self.assertRaises(msmtpd.PermanentFailure):
            msmtpd.Command("cat --").check("-oQ/tmp@c.example")

    def test_a_mail_made_by_hand_is_checked_too(self):
        with self.assertRaises(msmtpd.PermanentFailure):
            msmtpd.Command("cat; true")(msmtpd.Mail("a@b", ["$(touch x)@b"], b"x\n"))

    def test_commands_that_cannot_work(self):
        for text in ("", "  ", "cat\ncat", "cat;", "cat &", "cat | ", "cat >", "cat <", "cat &&",
                     "cat 'x", 'cat "x', "if cat", "cat )", "cat ${"):
            with self.subTest(text), self.assertRaises(ValueError):
                msmtpd.Command(text)

    def test_commands_that_may_not_work(self):
        for text, count in (("cat # %F", 1), ("cat %F #", 1), ("nosuchprogram %F", 1),
                            ("./nosuchprogram %F", 1), ("cat 'a # b'", 0), ("cat a#b", 0),
                            ("exec cat", 0), ("cat $(true)", 0)):
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

    def test_arguments_and_input(self):
        body = b"x\0\xff\n" * 10
        for text, sender, recipients, arguments in (
                (" -f %F --", "a@b", ["c@d", "e@f"], ["-f", "a@b", "--", "c@d", "e@f"]),
                (" --from=%F %F", "", ["c"], ["--from=MAILER-DAEMON", "%F", "c"]),
                (" 'a b' \"c\" \\$", "a@b", ["o'brien@d"], ["a b", "c", "$", "o'brien@d"]),
                (" -f %F; true", "a@b", ["c@d"], ["-f", "a@b"]),
                (" \"$HOME\" -f '%F' -- ", "", ["c", "d"],
                 [os.environ.get("HOME", ""), "-f", "MAILER-DAEMON", "--", "c", "d"])):
            with self.subTest(text):
                mail = msmtpd.Mail(sender, recipients, body)
                self.assertEqual(self.run_command(self.capture + text, mail), (None, "exit=0"))
                self.assertEqual(self.delivered()[-1], (arguments, body))

    def test_exit_statuses(self):
        expected = {0: None, **{status: (554, "5.3.0") for status in range(1, 256)}}
        expected.update({
            65: (554, "5.6.0"), 67: (554, "5.1.1"), 77: (554, "5.7.0"), 78: (554, "5.3.5"),
            68: (451, "4.3.0"), 69: (451, "4.3.0"), 71: (451, "4.3.0"), 75: (451, "4.3.0"),
            126: (451, "4.3.5"), 127: (451, "4.3.5")})
        script = self.script("exit", "#!/bin/sh\nexit $1\n")
        for status in (0, 1, 2, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 100,
                       111, 125, 126, 127, 128, 129, 137, 255):
            for text in ("%s %d", "%s %d;:;exit $?", "%s %d || exit $?"):
                if ";:;" in text:
                    continue
                with self.subTest(text, status=status):
                    failure, outcome = self.run_command(text % (script, status))
                    reply = failure and (failure.code, failure.enhanced)
                    shell_says_signal = "||" in text and status > 128
                    self.assertEqual(reply, (451, "4.3.0") if shell_says_signal
                                     else expected[status])
                    self.assertEqual(outcome, "exit=%d" % status)

    def test_signals(self):
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

    def test_its_words_end_the_reply(self):
        script = self.script("moan", "#!/bin/sh\nprintf 'no\\033 way\\n\\nsorry\\n' >&2; exit 1\n")
        failure = self.run_command(script)[0]
        self.assertEqual(list(failure.details), ["no\x1b way", "sorry"])
        self.assertEqual(str(failure), "Command failed (exit 1): no? way; sorry")
        script = self.script("moan", "#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' x >&2; exit 1\n")
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

    def test_children_left_behind_hold_nothing_up(self):
        script = self.script("fork", "#!/bin/sh\nsleep 60 <&0 &\necho $! > %s/pid\n" % self.folder)
        started = time.monotonic()
        self.assertEqual(self.run_command(script)[1], "exit=0")
        self.assertLess(time.monotonic() - started, 30)
        with open(os.path.join(self.folder, "pid"), encoding="ascii") as file:
            os.kill(int(file.read()), signal.SIGKILL)

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

    def test_without_pidfd(self):
        with mock.patch.object(os, "pidfd_open", side_effect=OSError, create=True):
            for test in (self.test_arguments_and_input, self.test_signals, self.test_time_limit,
                         self.test_children_left_behind_hold_nothing_up,
                         self.test_mails_of_any_size_arrive_whole):
                shutil.rmtree(os.path.join(self.folder, "mails"))
                os.mkdir(os.path.join(self.folder, "mails"))
                test()

    def test_a_lost_status_is_no_success(self):
        before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            failure, outcome = self.run_command("true")
        finally:
            signal.signal(signal.SIGCHLD, before)
        self.assertEqual((failure.code, outcome), (451, "exit=lost"))

    def test_no_descriptor_is_left_open(self):
        before = descriptors()
        for text in ("true", "false", "nosuchprogram", "cat >/dev/null; true"):
            for size in (1, 100000, 2000000):
                self.run_command(text, msmtpd.Mail("a@b", ["c@d"], b"x" * size))
        self.assertEqual(descriptors(), before)


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


def descriptors():
    """The open descriptors of this process."""
    return {fd for fd in range(256) if not _closed(fd)}


def _closed(descriptor):
    try:
        os.fstat(descriptor)
        return False
    except OSError:
        return True


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
                      ("AUTH LOGIN", "334 VXNlcm5hbWU6", "us", "501 5.5.2")):
            with self.subTest(lines), Client(self.serve()) as client:
                client.open()
                for sent, expected in zip(lines[::2], lines[1::2]):
                    self.assertEqual(client.do(sent)[:len(expected)], expected)

    def test_any_authorization_identity_and_long_responses(self):
        long = "p" * 8000
        server = self.serve(authenticate=msmtpd.one_user("user", long))
        for line in ("AUTH PLAIN " + encoded("someone\0user\0" + long), ):
            with Client(server) as client:
                self.assertEqual(client.open(line)[:3], "235")
        with Client(server) as client:
            self.assertEqual(client.open("AUTH PLAIN", encoded("\0user\0" + long))[:3], "235")
        with Client(server) as client:
            self.assertEqual(client.open("AUTH PLAIN", "x" * 12287)[:9], "500 5.5.2")
            self.assertEqual(client.do("NOOP")[:3], "250")

    def test_not_in_a_transaction(self):
        with Client(self.serve()) as client:
            client.open("AUTH PLAIN " + self.RIGHT, "MAIL FROM:<a@b>")
            self.assertEqual(client.do("AUTH PLAIN " + self.RIGHT)[:9], "503 5.5.1")

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

    def test_only_the_right_pair(self):
        check = msmtpd.one_user("\u00fcser", "s\u00e9cret")
        self.assertTrue(check("\u00fcser", "s\u00e9cret"))
        for user, password in (("\u00fcser", ""), ("", "s\u00e9cret"), ("", ""), ("user", "secret"),
                               ("\u00fcser", "s\u00e9cret "), ("\u00fcser ", "s\u00e9cret")):
            self.assertFalse(check(user, password))

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

    def test_silent_clients_stay_while_there_is_room(self):
        self.patch(FULL_TIMEOUT=0.1)
        with Client(self.serve(max_sessions=3)) as client:
            client.open()
            self.assertEqual(select.select([client.socket], [], [], 1.5)[0], [])
            self.assertEqual(client.do("NOOP")[:3], "250")

    def test_threads_are_kept_and_reused(self):
        server = self.serve()
        names = set()
        for _ in range(50):
            with Client(server) as client:
                client.open()
                client.do("QUIT")
                names.update(t.name for t in threading.enumerate() if "msmtpd" in t.name)
        self.assertLess(len(names), 5)

    def test_accept_may_fail(self):
        server = self.serve()
        real, failures = server._crew._listeners[0], [OSError(24, "Too many open files")] * 3

        class Listener:
            """Fails three times, as a process without descriptors does."""

            def fileno(self):
                return real.fileno()

            def accept(self):
                if failures:
                    raise failures.pop()
                return real.accept()

            def close(self):
                real.close()
        with self.assertLogs("msmtpd", "ERROR") as logs:
            with Client(server) as client:     # has woken the thread that polls
                client.open()
            server._crew._listeners[0] = Listener()
            with Client(server) as client:
                client.open()
            with Client(server) as client:
                self.assertEqual(client.open()[:3], "250")
        self.assertEqual(failures, [])
        self.assertEqual(len(logs.output), 1)

    def test_threads_may_be_not_to_be_had(self):
        server = self.serve()
        with mock.patch("_thread.start_new_thread", side_effect=RuntimeError("no")), \
                self.assertLogs("msmtpd", "ERROR") as logs:
            for _ in range(3):
                with Client(server) as client:
                    self.assertEqual(client.open()[:3], "250")
                    client.do("QUIT")
        self.assertEqual(len(logs.output), 1)
        with Client(server) as first, Client(server) as second:
            self.assertEqual((first.open()[:3], second.open()[:3]), ("250", "250"))

    def test_dual_stack(self):
        try:
            server = self.serve(host="::")
        except OSError:
            self.skipTest("no IPv6")
        for host in ("127.0.0.1", "::1"):
            with Client((host, server.port)) as client:
                client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA", "x\r\n.")
            self.assertEqual(self.mails[-1].peer.host, host)

    def test_several_interfaces_share_a_free_port(self):
        try:
            server = self.serve(host=("127.0.0.1", "::", "127.0.0.1"))
        except OSError:
            self.skipTest("no IPv6")
        self.assertEqual([peer.host for peer in server.addresses], ["127.0.0.1", "::"])
        for host in ("127.0.0.1", "::1"):
            with Client((host, server.port)) as client:
                self.assertEqual(client.open()[:3], "250")


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
        for arguments, words in (
                (["--port=65536"], "--port"), (["--port=x"], "--port"), (["--port="], "--port"),
                (["--port", "-1"], "--port"), (["--interface="], "--interface"),
                (["--interface=localhost", "--port=0"], "localhost is no IP address"),
                (["--interface=300.1.1.1", "--port=0"], "300.1.1.1 is no IP address"),
                (["--interface=192.0.2.1", "--port=0"], "cannot listen on 192.0.2.1"),
                (["--command="], "--command"), (["--command= "], "empty"),
                (["--command=cat;"], "ends in ;"), (["--command=cat 'x"], "Unterminated|unexpected"),
                (["--command=a\nb"], "one line"), (["--log="], "--log"),
                (["--log=/nonexistent/log"], "/nonexistent/log"), (["--auth="], "--auth"),
                (["--auth=,x"], "--auth"), (["--auth=x,"], "--auth"),
                (["--auth=x,false"], "exit status 1"), (["--auth=x,true"], "no password"),
                (["--auth=x,echo"], "no password"), (["--max-size=x"], "--max-size"),
                (["--max-size=-1"], "--max-size"), (["--max-sessions=0"], "--max-sessions"),
                (["--timeout=0"], "--timeout"), (["--timeout=nan"], "--timeout"),
                (["--delivery-timeout=x"], "--delivery-timeout"), (["--received=no"], "--received"),
                (["--tls-cert-file=/nonexistent/c"], "/nonexistent/c"),
                (["--tls-key-file=/x"], "--tls-cert-file"), (["--prot=25"], "--port"),
                (["word"], "word"), (["-p", "25"], "-p"), (["--in"], "ambiguous"),
                (["--tls-starttls=maybe"], "--tls-starttls")):
            with self.subTest(arguments):
                status, text = self.run_here(*arguments)
                self.assertEqual(status, 3)
                self.assertRegex(text, r"\Amsmtpd: .*\n\Z")
                self.assertRegex(text, words)

    def test_both_forms_and_abbreviations(self):
        daemon = self.start("--po", "0", "--inter", "127.0.0.1", "--command", self.capture,
                            "--max-siz=1K", "--lo=" + self.log)
        with Client(daemon) as client:
            client.reply()
            client.send("EHLO x\r\n")
            self.assertIn("250-SIZE 1024", client.reply())
        self.assertEqual(self.stop(daemon)[0], 0)

    def test_warnings(self):
        for arguments, words in ((["--command=nosuchprogram %F --"], "nosuchprogram"),
                                 (["--command=cat # %F"], "comment"),
                                 (["--interface=0.0.0.0"], "--auth")):
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

    def test_what_became_of_a_mail(self):
        script = self.script("fail", "#!/bin/sh\necho broken >&2; exit $1\n")
        for status, reply, word in ((1, "554 5.3.0", "failed"), (75, "451 4.3.0", "deferred")):
            daemon = self.start("--command=%s %d" % (script, status), "--received=off")
            self.assertEqual(self.send(daemon), reply + " Command failed (exit %d): broken" % status)
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

    def test_values_in_the_log_are_escaped_and_cut(self):
        daemon = self.start()
        with Client(daemon) as client:
            client.open("MAIL FROM:<%s@b> SMTPUTF8" % ("x" * 300), "RCPT TO:<\u00fc\u0301@b>", "DATA",
                        "x\r\n.")
        self.stop(daemon)
        self.assertIn("from=<%s>" % ("x" * 200), self.logged())

    def test_debug_shows_the_dialogue_but_no_secret(self):
        daemon = self.start("--debug", "--auth=user,echo secret")
        with Client(daemon) as client:
            client.open("AUTH PLAIN " + encoded("\0user\0wrong"), "AUTH LOGIN", encoded("user"),
                        encoded("secret"), "AUTH PLAIN " + encoded("\0user\0secret"),
                        encoded("secret"), "AUTH " + encoded("secret"), "MAIL FROM:<a@b>", "QUIT")
        self.stop(daemon)
        self.assertIn("C: MAIL FROM:<a@b>", self.logged())
        self.assertIn("S: 250 2.1.0 Sender accepted", self.logged())
        for secret in ("secret", encoded("secret"), "wrong", encoded("\0user\0secret")[:8]):
            self.assertNotIn(secret, self.logged())

    def test_log_is_reopened(self):
        for change in (lambda: None, lambda: daemon.send_signal(signal.SIGHUP)):
            daemon = self.start()
            os.rename(self.log, self.log + ".1")
            change()
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
        port = free_port()
        daemon = self.start("--port=%d" % port, "--log=-", log=False)
        wait_for(lambda: can_connect(port), "the daemon")
        self.assertRegex(self.stop(daemon)[1], r"info: listening on \[127.0.0.1\]:%d" % port)

    def test_path_where_there_is_none(self):
        script = self.script("path", "#!/bin/sh\n/usr/bin/env > %s/env\n" % self.folder)
        daemon = self.start("--command=" + script, env={})
        self.send(daemon)
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertIn("PATH=%s\n" % msmtpd.DEFAULT_PATH, file.read())

    def test_terminal(self):
        import pty
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        daemon = self.start("--command=cat -- ", stderr=slave)
        os.close(slave)
        self.assertTrue(select.select([master], [], [], PATIENCE)[0])
        line = os.read(master, 1000).decode()
        self.assertIn("listening on [127.0.0.1]:%d, piping mails to: cat --" % daemon.port, line)
        self.assertEqual(line.count("\n"), 1)

    def test_inherited_sockets(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            # A shell puts the socket where systemd does, and keeps its process id for exec.
            text = 'exec 3<&%d; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"' % listener.fileno()
            process = subprocess.Popen(
                ["bash", "-c", text, "sh", sys.executable, PROGRAM, "--log=" + self.log,
                 "--command=%s; env > %s/env; :" % (self.capture, self.folder)],
                pass_fds=[listener.fileno()], stderr=subprocess.PIPE)
            self.addCleanup(self.end, process)
        self.assertEqual(self.send(("127.0.0.1", port))[:3], "250")
        with open(os.path.join(self.folder, "env"), encoding="ascii") as file:
            self.assertNotIn("LISTEN_", file.read())
        self.assertEqual(self.stop(process), (0, ""))

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

    def test_second_signal(self):
        script = self.script("slow", "#!/bin/sh\ntouch %s/on\nsleep 60\nexec %s\n"
                             % (self.folder, self.capture))
        daemon = self.start("--command=" + script)
        with Client(daemon) as client:
            client.open("MAIL FROM:<a@b>", "RCPT TO:<c@d>", "DATA")
            client.send("x\r\n.\r\n")
            wait_for(lambda: os.path.exists(os.path.join(self.folder, "on")), "the command")
            daemon.send_signal(signal.SIGTERM)
            wait_for(lambda: not can_connect(daemon.port), "the end of listening")
            self.assertEqual(self.stop(daemon)[0], 1)
            self.assertEqual(client.rest(), "")
        self.assertEqual(self.delivered(), [])


class Inetd(ProgramCase):
    """One session on standard input and output."""

    DIALOGUE = (b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nx\r\n.\r\n", b"QUIT\r\n")

    def run_inetd(self, data, *arguments, **options):
        return self.run_program("--inetd", "--command=%s --" % self.capture, *arguments,
                                input=data, **options)

    def test_pipes(self):
        done = self.run_inetd(b"".join(self.DIALOGUE))
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertTrue(done.stdout.startswith(b"220 localhost ESMTP msmtpd\r\n250-"))
        self.assertTrue(done.stdout.endswith(b"250 2.0.0 Delivered\r\n221 2.0.0 Goodbye\r\n"))
        self.assertEqual(self.delivered()[0][1][:20], b"Received: from x\n\tby")

    def test_exit_status(self):
        fails = "--command=cat >/dev/null; exit 75"
        for data, arguments, status in (
                (b"", (), 0), (b"EHLO x\r\n", (), 0), (b"QUIT\r\n", (), 0),
                (b"EHLO x\r\nMAIL FROM:<a@b>\r\n", (), 1), (self.DIALOGUE[0], (), 0),
                (self.DIALOGUE[0][:-3], (), 1), (b"GET / HTTP/1.0\r\n", (), 1),
                (b"".join(self.DIALOGUE), (fails,), 1), (b"FROB\r\n" * 10, (), 1)):
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

    def test_person_at_a_terminal(self):
        import pty
        import tty
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        tty.setraw(slave)
        process = subprocess.Popen([sys.executable, PROGRAM, "--inetd", "--command=" + self.capture],
                                   stdin=slave, stdout=slave, stderr=slave)
        self.addCleanup(self.end, process)
        os.close(slave)
        os.write(master, b"HELO me\nMAIL FROM:me\nRCPT TO:you\nDATA\nHello\n.\nQUIT\n")
        self.assertEqual(process.wait(PATIENCE), 0)
        self.assertEqual(without_trace(self.delivered()[0][1]), b"Hello\n")

    def test_refusal_is_told_to_the_client_and_the_log(self):
        done = self.run_inetd(b"", "--auth=x,false", "--log=" + self.log)
        self.assertEqual((done.returncode, done.stdout[:10]), (3, b"421 4.3.0 "))
        self.assertIn("error: the password command failed", self.logged())
        done = self.run_inetd(b"", "--frob")
        self.assertEqual((done.returncode, done.stdout[:10]), (3, b"421 4.3.0 "))

    def test_signal(self):
        process = subprocess.Popen([sys.executable, PROGRAM, "--inetd", "--command=cat"],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(self.end, process)
        self.assertEqual(process.stdout.readline(), b"220 localhost ESMTP msmtpd\r\n")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.stdout.read()[:9], b"421 4.3.2")
        self.assertEqual(process.wait(PATIENCE), 1)

    def test_closed_descriptors(self):
        for closed in ("2>&-", "<&- >&- 2>&-"):
            status = subprocess.run(["sh", "-c", 'exec "$@" ' + closed, "sh", sys.executable, PROGRAM,
                                     "--inetd"], stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, timeout=PATIENCE, check=False)
            self.assertEqual(status.returncode, 0, closed)


if __name__ == "__main__":
    unittest.main()
