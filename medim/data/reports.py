from medim.config import options


@options
class ReportOptions:
    """X.

    Attributes:
        blanks: what.
    """

    blanks: str = "drop"


def prepare_report(text, options):
    return " ".join(text.split())
