"""`flowspace explore`: a local page on which one designs a schedule and a statistic.

`design` holds what is typed and what follows from it, `maps`, `mixture` and `training` what is
drawn, as plain data; `drawing` makes pictures of it, `workers` computes it apart from the page,
and `page` is the only file that knows NiceGUI (extra ``explore``).
"""
