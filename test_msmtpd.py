# SPDX-License-Identifier: MIT
"""Tests of msmtpd.py, in the order of its manual and of RFC 5321: run `python3 -m unittest`.

They need nothing but Python and a POSIX system, listen on free ports of 127.0.0.1 only, and skip
by name where a program that they talk to is missing.
"""

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
    return (mail.sender, mail.recipients, mail.data, mail.helo, mail.user, mail.tls)


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


if __name__ == "__main__":
    unittest.main()
