from __future__ import annotations

import pytest

from runtime.text import printable, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rtsp://admin:pw@10.0.0.7:554/cam", "rtsp://***@10.0.0.7:554/cam"),
        ("rtsp://admin:p@ss/w#rd@10.0.0.7/cam", "rtsp://***@10.0.0.7/cam"),
        ("RTSPS:/admin:pw@host/cam", "RTSPS:/***@host/cam"),
        ("rtsp://host/user=admin_password=pw_channel=1", "rtsp://host/user=***"),
        ("http://host/video?token=abc&size=4", "http://host/video?token=***&size=4"),
        ("srt://host:9000?passphrase=pw", "srt://host:9000?passphrase=***"),
        (
            'rtspsrc location=rtsp://host/cam user-id=admin user-pw="a b" ! appsink',
            "rtspsrc location=rtsp://host/cam user-id=*** user-pw=*** ! appsink",
        ),
        ("a@b.jpg: key=1", "a@b.jpg: key=1"),
        ("C:/me@home/a.jpg", "C:/me@home/a.jpg"),
    ],
)
def test_no_credential_of_an_address_is_shown(text, shown):
    assert without_credentials(text) == shown
    assert "pw" not in shown.replace("user-pw", "")


def test_text_is_one_line_of_characters_that_can_be_printed():
    assert printable("gr\udcfcn\n\x1b[2J \u87ba.jpg") == "gr\\udcfcn\\n\\x1b[2J \u87ba.jpg"
