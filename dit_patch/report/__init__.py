"""The report on what handles did: of one handle, and of a process when it ends.

    handle.rows()            # data: `rows`
    print(handle)            # text: `text`
    journal.keep(handle)     # `journal`: told at the end of the process

`rows` has a row for each site.
`text` words the report on one handle, and `html` lays it out for a notebook.
`reported` is the base of every handle: whoever wants its last rows is told when it ends.
`journal` is what a process has to tell; in it there is one of `kept` for each handle, which outlives the handle.
`document` is the report on one process as plain data, as text and as a file.
"""
