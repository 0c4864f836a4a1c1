"""From the files of a run to tables, plots and one page. Nothing is measured or computed anew here."""
