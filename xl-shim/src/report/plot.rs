//! Plots as SVG, for a page that has to work without anything else: lines over time, bars beside
//! each other, and one bar made of parts.
//!
//! What it is not: a library for plots. It draws what the report has.

use std::fmt::Write as _;

/// Size of a plot in the units of its view box; the page scales it.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 240.0;
/// Room for the numbers of the axes.
const LEFT: f64 = 64.0;
const BOTTOM: f64 = 28.0;
const TOP: f64 = 10.0;
/// Colours that most people can tell apart, from the first series on; then they come again.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c8c"];

/// One line of a plot: its name, and points from left to right.
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Lines over a common axis; each has a title to be shown where it is pointed at.
pub(super) fn lines(id: &str, label: &str, series: &[Series], units: (&str, &str)) -> String {
    let points = || series.iter().flat_map(|one| &one.points);
    let x_max = points().map(|(x, _)| *x).fold(0.0, f64::max).max(1e-3);
    let axis = Axis::up_to(points().map(|(_, y)| *y).fold(0.0, f64::max));
    let mut svg = open(id, label, HEIGHT);
    axis.draw(&mut svg, units.1);
    let x = |value: f64| LEFT + value / x_max * (WIDTH - LEFT - 10.0);
    let time = Axis::up_to(x_max);
    for tick in time.ticks().filter(|tick| *tick <= x_max * 1.001) {
        let text = time.text(tick);
        let _ = writeln!(
            svg,
            r#"<text class="tick" x="{:.1}" y="{:.1}" text-anchor="middle">{text} {}</text>"#,
            x(tick),
            HEIGHT - 8.0,
            units.0
        );
    }
    for (index, one) in series.iter().enumerate() {
        let path: Vec<String> = one
            .points
            .iter()
            .map(|(at, value)| format!("{:.1},{:.1}", x(*at), axis.y(*value)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.8\" \
             points=\"{}\">{}</polyline>",
            colour(index),
            path.join(" "),
            tip(&one.name)
        );
    }
    svg + "</svg>\n" + &legend(series.iter().map(|one| one.name.as_str()))
}

/// Groups of bars: the name of each group, and a value of each series.
pub(super) fn bars(
    id: &str,
    label: &str,
    names: &[&str],
    groups: &[(String, Vec<f64>)],
    unit: &str,
) -> String {
    let axis = Axis::up_to(groups.iter().flat_map(|(_, v)| v).copied().fold(0.0, f64::max));
    let mut svg = open(id, label, HEIGHT);
    axis.draw(&mut svg, unit);
    let room = (WIDTH - LEFT - 10.0) / groups.len().max(1) as f64;
    let width = (room * 0.8 / names.len().max(1) as f64).min(40.0);
    for (at, (name, values)) in groups.iter().enumerate() {
        let middle = LEFT + room * (at as f64 + 0.5);
        let left = middle - width * values.len() as f64 / 2.0;
        for (index, value) in values.iter().enumerate() {
            let (x, y) = (left + width * index as f64, axis.y(*value));
            let height = axis.y(0.0) - y;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
                 fill=\"{}\">{}</rect>",
                colour(index),
                tip(&format!("{name}: {value:.0}"))
            );
        }
        // Of many groups not each has room for its name.
        if groups.len() <= 16 || at % groups.len().div_ceil(16) == 0 {
            let _ = writeln!(
                svg,
                r#"<text class="tick" x="{middle:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                HEIGHT - 8.0,
                escape(name)
            );
        }
    }
    svg + "</svg>\n" + &legend(names.iter().copied())
}

/// One bar of all parts, each with its name and value.
pub(super) fn parts(id: &str, label: &str, parts: &[(&str, f64)], unit: &str) -> String {
    let sum: f64 = parts.iter().map(|(_, value)| value).sum::<f64>().max(1e-9);
    let mut svg = open(id, label, 44.0);
    let mut x = 0.0;
    for (index, (name, value)) in parts.iter().enumerate() {
        let width = value / sum * WIDTH;
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"4\" width=\"{width:.1}\" height=\"36\" fill=\"{}\">{}</rect>",
            colour(index),
            tip(&format!("{name}: {value:.1} {unit}"))
        );
        x += width;
    }
    let names: Vec<String> =
        parts.iter().map(|(name, value)| format!("{name}: {value:.1} {unit}")).collect();
    svg + "</svg>\n" + &legend(names.iter().map(String::as_str))
}

/// Text as it stands in HTML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            other => out.push(other),
        }
    }
    out
}

/// What is shown where it is pointed at.
fn tip(text: &str) -> String {
    format!("<title>{}</title>", escape(text))
}

fn open(id: &str, label: &str, height: f64) -> String {
    format!(
        "<svg id=\"{id}\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {height}\">\n",
        escape(label)
    )
}

fn legend<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut out = "<p class=\"legend\">".to_owned();
    for (index, name) in names.enumerate() {
        let (colour, name) = (colour(index), escape(name));
        let _ = write!(out, "<span><i style=\"background:{colour}\"></i>{name}</span> ");
    }
    out + "</p>\n"
}

fn colour(index: usize) -> &'static str {
    COLOURS.iter().cycle().nth(index % COLOURS.len()).copied().unwrap_or_default()
}

/// From 0 to at least some value, with about four round numbers between.
struct Axis {
    step: f64,
    steps: u32,
}

impl Axis {
    fn up_to(max: f64) -> Axis {
        let max = if max.is_finite() && max > 0.0 { max } else { 1.0 };
        let magnitude = 10_f64.powf((max / 4.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|factor| factor * magnitude)
            .find(|step| step * 5.0 >= max)
            .unwrap_or(magnitude * 10.0);
        let steps = (1..6).find(|steps| f64::from(*steps) * step >= max).unwrap_or(5);
        Axis { step, steps }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (0..=self.steps).map(|at| f64::from(at) * self.step)
    }

    fn text(&self, tick: f64) -> String {
        if self.step < 1.0 { format!("{tick:.2}") } else { format!("{tick:.0}") }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value / (self.step * f64::from(self.steps))).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    }

    fn draw(&self, svg: &mut String, unit: &str) {
        for tick in self.ticks() {
            let (y, text) = (self.y(tick), self.text(tick));
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">\
                 {text}{unit}</text>",
                LEFT - 6.0,
                y + 4.0
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_round_numbers_and_room_for_the_largest_value() {
        for max in [0.0, 0.03, 1.0, 7.3, 99.0, 100.0, 12_345.0, f64::NAN, 1e12] {
            let axis = Axis::up_to(max);
            let last = axis.ticks().last().unwrap();
            assert!(last >= max || max.is_nan(), "{max}: {last}");
            assert!((2..=6).contains(&axis.ticks().count()), "{max}");
        }
        assert_eq!(Axis::up_to(7.3).ticks().collect::<Vec<_>>(), [0.0, 2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn names_cannot_break_out_of_the_page() {
        let svg = parts("x", "a\"b", &[("<script>", 1.0)], "ms");
        assert!(!svg.contains("<script>") && svg.contains("&lt;script&gt;"), "{svg}");
        assert!(svg.contains("a&quot;b"), "{svg}");
    }
}
