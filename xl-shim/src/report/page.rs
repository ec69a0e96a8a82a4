//! The report as a page: one file that a browser shows without anything else, from anywhere, with
//! plots drawn here and the JSON inside.

use std::fmt::Write as _;

use super::plot::{self, Series, escape};
use super::{MIB, Outcome, Report, Target, as_f64};

const STYLE: &str = "
:root { color-scheme: light dark; --text: #1b1b1b; --dim: #666; --line: #ddd; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --dim: #9a9a9a; --line: #3a3a3a; --back: #161616; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
       max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
svg { width: 100%; height: auto; display: block; }
svg .grid { stroke: var(--line); } svg .tick { fill: var(--dim); font-size: 12px; }
.legend { margin: .3rem 0; color: var(--dim); font-size: 13px; }
.legend i { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 0; }
.legend span { margin-right: 1em; white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.note { color: var(--dim); font-size: 13px; }
";

/// The whole page.
pub(super) fn page(report: &Report) -> anyhow::Result<String> {
    let title = escape(&title(report));
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <link rel=\"icon\" href=\"data:,\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    for cause in &report.cause {
        let _ = writeln!(out, "<p class=\"cause\">{}</p>", escape(cause));
    }
    out += &overview(report);
    out += &rates(report);
    out += &passes(report);
    out += &pause(report);
    out += &connections(report);
    out += &counters(report);
    // In a script's text nothing is escaped but by the script's own means.
    let json = serde_json::to_string(report)?.replace('<', "\\u003c");
    let _ = write!(
        out,
        "<script type=\"application/json\" id=\"report\">{json}</script>\n</body>\n</html>\n"
    );
    Ok(out)
}

fn title(report: &Report) -> String {
    let (Target::Host(target) | Target::File(target)) = &report.target;
    let outcome = match report.outcome {
        Outcome::Moved => "moved to",
        Outcome::Saved => "saved to",
        Outcome::Cancelled => "cancelled: not sent to",
        Outcome::Failed => "failed: not sent to",
        Outcome::NotResumed => "failed, suspended here: not sent to",
        Outcome::Uncertain => "suspended here, may run on",
    };
    format!("{} {outcome} {target}", report.domain)
}

/// Rows of a table, cell by cell; the first row has headings.
fn table(id: &str, rows: &[Vec<String>]) -> String {
    let mut out = format!("<table id=\"{id}\">\n");
    for (index, row) in rows.iter().enumerate() {
        let tag = if index == 0 { "th" } else { "td" };
        let cells: Vec<String> =
            row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect();
        let _ = writeln!(out, "<tr>{}</tr>", cells.concat());
    }
    out + "</table>\n"
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

fn overview(report: &Report) -> String {
    let ms = |value: Option<f64>| value.map_or("–".to_owned(), |ms| format!("{ms:.0} ms"));
    let expected = report.pause_expected_ms.map_or(String::new(), |ms| format!(" ({ms} expected)"));
    let mib = |bytes: Option<u64>| {
        bytes.map_or("–".to_owned(), |bytes| format!("{:.1} MiB", as_f64(bytes) / MIB))
    };
    let rate = report.rate_mib_s.map_or("–".to_owned(), |rate| format!("{rate:.1} MiB/s"));
    table(
        "overview",
        &[
            row(&["time", "pause", "time to suspend", "memory sent", "rate", "passes"]),
            vec![
                format!("{:.1} s", report.total_ms / 1000.0),
                ms(report.pause_ms) + &expected,
                ms(report.suspend_wait_ms),
                mib(report.bytes),
                rate,
                report.passes.len().to_string(),
            ],
        ],
    )
}

/// How fast it went: each connection, or else the stream.
fn rates(report: &Report) -> String {
    let mut numbers: Vec<u8> =
        report.samples.iter().flat_map(|s| s.links.iter().map(|(link, _)| *link)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let rate = |bytes: &dyn Fn(&super::Sample) -> Option<u64>| -> Vec<(f64, f64)> {
        let pairs = report.samples.windows(2).filter_map(|pair| {
            let [from, to] = pair else { return None };
            let seconds = (to.ms - from.ms) / 1000.0;
            let sent = bytes(to)?.saturating_sub(bytes(from).unwrap_or_default());
            (seconds > 0.0).then_some((to.ms / 1000.0, as_f64(sent) / MIB / seconds))
        });
        pairs.collect()
    };
    let of_link = |number: u8| Series {
        name: format!("connection {number}"),
        points: rate(&|sample| sample.links.iter().find(|(n, _)| *n == number).map(|(_, b)| *b)),
    };
    let mut series = vec![Series { name: "all".to_owned(), points: rate(&|s| Some(s.bytes)) }];
    series.extend(numbers.into_iter().map(of_link));
    if series.first().is_none_or(|all| all.points.is_empty()) {
        return String::new();
    }
    let plot = plot::lines("rates", "Rate over time by connection", &series, ("s", " MiB/s"));
    format!("<h2>Rate by connection</h2>\n{plot}")
}

fn passes(report: &Report) -> String {
    if report.passes.is_empty() {
        return String::new();
    }
    let name = |pass: &super::Pass| match pass.last {
        true => "last".to_owned(),
        false => pass.pass.to_string(),
    };
    let groups: Vec<(String, Vec<f64>)> = report
        .passes
        .iter()
        .map(|p| (name(p), vec![as_f64(p.pages.wanted), as_f64(p.pages.sent())]))
        .collect();
    let label = "Pages to look at and pages sent, by pass";
    let plot = plot::bars("passes", label, &["remaining", "sent"], &groups, "");
    let mut rows = vec![row(&["pass", "remaining", "sent", "MiB", "s", "MiB/s"])];
    rows.extend(report.passes.iter().map(|pass| {
        let (mib, seconds) = (as_f64(pass.bytes) / MIB, pass.ms / 1000.0);
        vec![
            name(pass),
            pass.pages.wanted.to_string(),
            pass.pages.sent().to_string(),
            format!("{mib:.1}"),
            format!("{seconds:.2}"),
            format!("{:.1}", if seconds > 0.0 { mib / seconds } else { 0.0 }),
        ]
    }));
    format!(
        "<h2>Pages by pass</h2>\n{plot}{}<p class=\"note\">Remaining is what a pass had to look \
         at: of the first all that the guest may have, of later ones what it had written \
         meanwhile.</p>\n",
        table("pass-table", &rows)
    )
}

fn pause(report: &Report) -> String {
    let Some(pause) = &report.pause else { return String::new() };
    let verify = pause.verify_ms.map(|ms| ("digests", ms));
    let parts = [("last pass", pause.last_pass_ms)].into_iter().chain(verify).chain([
        ("state", pause.state_ms),
        ("target: devices", pause.target_ms),
        ("handing over", pause.handshake_ms),
    ]);
    let parts: Vec<_> = parts.collect();
    let plot = plot::parts("pause", "The pause by cause", &parts, "ms");
    format!("<h2>The pause by cause</h2>\n{plot}")
}

fn connections(report: &Report) -> String {
    if report.links.is_empty() {
        return String::new();
    }
    let mut rows = vec![row(&["connection", "MiB", "batches", "queue", "stalled", "lost"])];
    rows.extend(report.links.iter().map(|link| {
        vec![
            link.link.to_string(),
            format!("{:.1}", as_f64(link.bytes) / MIB),
            link.batches.to_string(),
            format!("{:.0} % full", link.queue * 100.0),
            format!("{:.0} ms", link.stalled_ms),
            link.lost.clone().unwrap_or_default(),
        ]
    }));
    format!("<h2>Connections</h2>\n{}", table("connections", &rows))
}

fn counters(report: &Report) -> String {
    let counters = &report.counters;
    let ms = |ns: u64| format!("{:.0} ms", as_f64(ns) / 1e6);
    let mut rows = vec![row(&["what all processes did", ""])];
    let calls = counters.hypercalls.iter();
    rows.extend(calls.map(|(name, count)| vec![format!("hypercall {name}"), count.to_string()]));
    rows.extend([
        vec!["mappings".to_owned(), counters.mappings.to_string()],
        vec!["pages mapped".to_owned(), counters.mapped_pages.to_string()],
        vec!["pages sent from earlier mappings".to_owned(), counters.kept_pages.to_string()],
        vec!["time to map".to_owned(), ms(counters.map_ns)],
        vec!["time to unmap".to_owned(), ms(counters.unmap_ns)],
        vec!["time stalled".to_owned(), ms(counters.stalled_ns)],
    ]);
    let left_out = counters.left_out.by_kind().into_iter().filter(|(_, saved)| saved.pages > 0);
    rows.extend(left_out.map(|(kind, saved)| {
        let mib = as_f64(saved.bytes) / MIB;
        vec![format!("not sent: {kind}"), format!("{mib:.1} MiB of {} pages", saved.pages)]
    }));
    format!("<h2>Work</h2>\n{}", table("work", &rows))
}

#[cfg(test)]
mod tests {
    use expect_test::expect_file;

    use super::super::example;
    use super::*;

    #[test]
    fn a_page_needs_nothing_else() {
        let page = page(&example()).unwrap();
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        // A browser looks at it in `tests/run report`.
        expect_file!["../../../docs/report-example.html"].assert_eq(&page);
    }

    #[test]
    fn nothing_in_a_report_becomes_a_part_of_the_page() {
        let cause = vec!["</script><script>alert(1)</script>".to_owned()];
        let report = Report { outcome: Outcome::Failed, cause, pause: None, ..example() };
        let page = page(&report).unwrap();
        assert_eq!(page.matches("<script").count(), 1);
        assert_eq!(page.matches("</script>").count(), 1);
        assert!(!page.contains("id=\"pause\""));
    }
}
