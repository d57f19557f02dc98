"""Takes out of a text what looks like a credential. Pure; the operator cleans what a container wrote with it, the trainer what a library said.

A net and not a proof: it knows the forms in which credentials turn up by accident (addresses, headers, environments, JSON, tokens with a known shape).
"""

import re

_NAMES = (
    r"authorization|x-amz-(?:signature|credential|security-token)|signature|(?:api|private)[_-]?key"
    r"|token|passw(?:or)?d|passphrase|secret(?:_?access_?key)?"
)
_SCHEME = r"(?:(?:bearer|basic|token|digest)\s+)?"
_QUOTE = r"\\*[\"']"  # backslashes: JSON or a repr inside a string
_VALUE = rf"(?:[bru]{{0,2}}(?P<quote>{_QUOTE}){_SCHEME}(?:(?!(?P=quote)).)*(?:(?P=quote))?|{_SCHEME}[^\s&,;\"'\\]+)"
_BASE64 = "[A-Za-z0-9/+]"

# No word boundaries before a token: where a line end is written as \n, a letter stands before it.
_SECRETS = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL), "***"),
    # user:password@ behind a scheme, also with a slash in the password; a port, as in http://host:8080/model@v2, is none.
    (re.compile(r"(?<=://)[^/\s?#]+@"), "***@"),
    (re.compile(r"(?<=://)[^\s/@:]{0,128}:(?!\d{1,5}(?:[/?#\s]|$))[^\s@]{0,256}@"), "***@"),
    # The same without a scheme; image:tag@sha256:... is none.
    (re.compile(r"(?<![\w/.%+-])[\w.%+-]+:[^\s@/:*]+@(?!sha\d+:)(?=[\w\[])"), "***@"),
    (re.compile(r"hf_(?!transfer\b)[A-Za-z0-9]{8,}"), "hf_***"),  # also one that a field of 16 characters cut off; hf_transfer is a package
    (re.compile(r"(AKIA|ASIA)[A-Z0-9]{12,}"), r"\1***"),
    (re.compile(r"(gh[pousr]_|github_pat_|glpat-)[A-Za-z0-9_-]{16,}"), r"\1***"),
    (re.compile(r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), "***"),  # a JSON web token, such as a service account's
    (re.compile(r"(?i)(bearer|basic)\s+[A-Za-z0-9._~+/=-]{16,}"), r"\1 ***"),
    (re.compile(rf"(?i)({_NAMES})(?:{_QUOTE})?\s*[=:]\s*{_VALUE}"), r"\1=***"),
    (re.compile(rf"(?i)(--[\w-]{{0,32}}(?:{_NAMES}))\s+\S+"), r"\1 ***"),
    # AWS' secret keys are 40 characters of all three kinds; a commit or a digest has no capitals.
    (re.compile(rf"(?<!{_BASE64})(?=[a-z0-9/+]*[A-Z])(?=[A-Z0-9/+]*[a-z])(?=[A-Za-z/+]*\d){_BASE64}{{40}}(?![\w/+=-])"), "***"),
)


def without_secrets(text: str) -> str:
    """The text with `***` in the place of what looks like a credential."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text
