"""What a user reads when something is wrong: one sentence, on one line."""

import re


def assert_sentence(error: BaseException, expected: str, **names: object) -> None:
    """The error's whole message is the expected one.

    Args:
        expected: word for word, but `...` for what another library says there.
        names: stand in braces in `expected`.
    """
    for name, value in names.items():
        expected = expected.replace(f"{{{name}}}", str(value))
    pattern = re.escape(expected).replace(r"\.\.\.", ".*")
    assert re.fullmatch(pattern, str(error)), f"{type(error).__name__}: {error}"
