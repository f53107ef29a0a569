def mount_page(app, server):
    pass
