"""Reports: notebooks run by papermill, several at a time, and turned into a site.

`result` is what a notebook hands to its report, `batch` runs notebooks and resumes, `html` makes
one page, `site` makes the front page, and `reproduce` puts them together.
"""
