"""Views for people: runs on the supercomputer, the doctor, previews, dashboards, links to source code."""
