"""The report of a merge: one page, folded from what lies in OUT/.raymeld."""
