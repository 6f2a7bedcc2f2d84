//! `inspect.html`: all pictures on one page, which lies beside them.

use std::fmt::Write;

use crate::train::report::escape;

const STYLE: &str = "\
:root{color-scheme:light dark;--soft:#667085;--line:#e4e7ec;--card:#fff;--paper:#f7f8fa;--ink:#1d2430}\
@media(prefers-color-scheme:dark){:root{--soft:#98a2b3;--line:#2b3240;--card:#1a2029;--paper:#12161d;\
--ink:#e6e9ef}}\
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}\
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}\
h1{font-size:24px;margin:0 0 8px}h2{font-size:18px;margin:34px 0 4px;overflow-wrap:anywhere}\
p{margin:0 0 12px;color:var(--soft)}\
section{display:flex;flex-wrap:wrap;gap:14px}\
figure{margin:0;padding:12px;background:var(--card);border:1px solid var(--line);border-radius:10px}\
figcaption{font-weight:600;margin-bottom:6px}\
img{display:block;max-width:100%;height:auto;background:#fff}";

/// One image and its pictures.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The image's name.
    pub title: String,
    /// What is said below it.
    pub text: String,
    /// The pictures, in order.
    pub figures: Vec<Figure>,
}

/// One picture.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What it shows.
    pub caption: String,
    /// Its file's name, of letters, digits, dots, hyphens and underscores.
    pub file: String,
    /// Pixels: width and height.
    pub size: (u32, u32),
}

/// The page.
pub fn render(title: &str, entries: &[Entry]) -> String {
    let title = escape(title);
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Experts of {title}</title><style>{STYLE}</style></head><body><main>\
         <h1>Experts of {title}</h1>\
         <p>The first expert of each patch, by colour and number, on what the model sees of the \
         image. Shares are of the image's patches.</p>"
    );
    for entry in entries {
        let _ = write!(
            html,
            "<h2>{}</h2><p>{}</p><section>",
            escape(&entry.title),
            escape(&entry.text)
        );
        for figure in &entry.figures {
            let (width, height) = figure.size;
            let _ = write!(
                html,
                "<figure><figcaption>{0}</figcaption><img src=\"{1}\" alt=\"{0}\" \
                 width=\"{width}\" height=\"{height}\"></figure>",
                escape(&figure.caption),
                escape(&figure.file),
            );
        }
        html.push_str("</section>");
    }
    html + "</main></body></html>\n"
}
