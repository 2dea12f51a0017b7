// The search runs in a worker, which browsers refuse to pages that are opened as files. There this class takes the place of
// Worker: it runs the worker's script in a hidden frame. It has what the theme's search uses, and no more.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      this.inside.document.open() // else Firefox replaces the document once more
      this.inside.document.write("<!doctype html><body>")
      this.inside.document.close()
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.loaded = new Promise((resolve) => {
        const script = this.inside.document.createElement("script")
        script.onload = resolve
        script.src = address
        this.inside.document.body.append(script)
      })
    }

    postMessage(data) {
      this.loaded.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
