"""A page with markers for tables, and a time, for the tests of what is exported."""

T0 = 1_700_000_000_000
PAGE = """# Page

Before.

<!-- results -->
old
<!-- /results -->

Between.

<!-- effects -->
<!-- /effects -->

After.
"""
