//! What users see of a migration, in a real browser: the page of `--report x.html`, and the live
//! view as a terminal shows it. Both are examples that tests of `xl-shim` keep true; here Chromium
//! (Debian's) loads them, says what it made of them, and makes the pictures in `docs/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use crate::tally::Tally;
use crate::unit::workspace;

/// The page.
const PAGE: &str = "docs/report-example.html";
/// The live view, as text.
const LIVE: &str = "docs/live-view.txt";
/// A picture of a page that shows nothing is smaller, in bytes.
const PICTURE_BYTES_MIN: usize = 8 << 10;

/// Looks at both; `update` writes the pictures.
pub fn run(tally: &mut Tally, update: bool) {
    let page = workspace().join(PAGE);
    tally.case("the report's page has all of its plots and tables", || {
        let dom = text(&chromium(&page, &["--dump-dom"])?.stdout);
        for (element, part, least) in [
            ("<svg id=\"rates\"", "<polyline", 3),
            ("<svg id=\"passes\"", "<rect", 8),
            ("<svg id=\"pause\"", "<rect", 4),
            ("<table id=\"pass-table\"", "<tr>", 5),
            ("<table id=\"connections\"", "<tr>", 3),
            ("<table id=\"work\"", "<tr>", 7),
        ] {
            let found = inside(&dom, element)?.matches(part).count();
            ensure!(found >= least, "{element} has {found} of {part}, not {least}");
        }
        let json = inside(&dom, "<script type=\"application/json\" id=\"report\"")?;
        let json = json.split_once('>').map_or("", |(_, json)| json);
        let report: serde_json::Value = serde_json::from_str(json).context("the JSON inside")?;
        ensure!(
            report.get("domain").is_some_and(|domain| domain == "web"),
            "the JSON inside is not the report: {report}"
        );
        Ok(())
    });
    tally.case("the browser's console stays empty", || {
        let log = ["--enable-logging=stderr", "--v=0", "--dump-dom"];
        let log = text(&chromium(&page, &log)?.stderr);
        let said: Vec<&str> = log.lines().filter(|line| line.contains("CONSOLE")).collect();
        ensure!(said.is_empty(), "it says: {}", said.join("\n"));
        Ok(())
    });
    let picture = |page: &Path, name: &str, size| picture(page, name, size, update);
    tally.case("a picture of the page", || picture(&page, "report.png", "820,1560"));
    tally.case("a picture of the live view", || {
        let directory = tempfile::tempdir()?;
        let page = directory.path().join("live.html");
        fs::write(&page, terminal(&fs::read_to_string(workspace().join(LIVE))?))?;
        picture(&page, "live-view.png", "860,150")
    });
}

/// What stands between the beginning of an element and its end.
fn inside<'a>(dom: &'a str, element: &str) -> Result<&'a str> {
    let name = element.trim_start_matches('<').split(' ').next().unwrap_or_default();
    let (_, rest) = dom.split_once(element).with_context(|| format!("there is no {element}"))?;
    rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside).context("it has no end")
}

/// A page that looks like a terminal with that text.
fn terminal(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><link rel=\"icon\" href=\"data:,\">\
         <body style=\"margin:0;background:#161616\"><pre style=\"margin:0;padding:12px;\
         color:#e6e6e6;font:14px/1.35 'DejaVu Sans Mono',monospace\">{text}</pre>"
    )
}

/// Has a picture made of `page`: `docs/NAME` with `update`, else one that is only looked at.
fn picture(page: &Path, name: &str, size: &str, update: bool) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join(name);
    let options = [format!("--screenshot={}", path.display()), format!("--window-size={size}")];
    chromium(page, &options.each_ref().map(String::as_str))?;
    let bytes = fs::read(&path).context("Chromium made no picture")?;
    ensure!(bytes.starts_with(b"\x89PNG"), "it is no PNG");
    ensure!(bytes.len() >= PICTURE_BYTES_MIN, "it is of {} bytes, too empty", bytes.len());
    if update {
        fs::write(workspace().join("docs").join(name), bytes)?;
    }
    Ok(())
}

fn chromium(page: &Path, options: &[&str]) -> Result<Output> {
    let profile = tempfile::tempdir()?;
    let output = Command::new("chromium")
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .args(options)
        .arg(format!("file://{}", absolute(page)?.display()))
        .output()
        .context("Cannot start chromium (apt-get install chromium)")?;
    ensure!(output.status.success(), "chromium: {}: {}", output.status, text(&output.stderr));
    Ok(output)
}

fn absolute(page: &Path) -> Result<PathBuf> {
    page.canonicalize().with_context(|| format!("Cannot find {}", page.display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_found_with_what_is_in_it() {
        let dom = "<p id=\"a\">x</p><p id=\"b\">y<i>z</i></p>";
        assert_eq!(inside(dom, "<p id=\"b\"").unwrap(), ">y<i>z</i>");
        assert!(inside(dom, "<p id=\"c\"").is_err());
    }
}
