"""What people look at: runs on the supercomputer, the doctor, previews, dashboards."""
