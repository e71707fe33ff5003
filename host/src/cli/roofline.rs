//! `kigo bench --plot`: the operations of a decode step under the roof of the memory's bandwidth, as an SVG.
//!
//! A roofline (Williams et al. 2009) has what is computed for each byte on its x axis and what is computed in each
//! second on its y axis, both in logarithms. What memory limits is on or below a slanted line; how far below is how far
//! from the floor of its time. There is no roof of the arithmetic: a step of one row never comes near it, and no
//! driver tells it.

use super::profile::{Row, whole};
use crate::error::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (1000, 620);
/// Right of the axes, where the points' labels stand in a column.
const LABELS: i32 = 300;
/// Where their heading stands.
const HEADING: i32 = 88;
/// From one label to the next, in pixels.
const LINE: i32 = 20;
/// Characters of a title's line at most: more would not fit its width.
const TITLE: usize = 90;

const ROOF: RGBColor = RGBColor(0xb0, 0x3a, 0x2e);
const POINT: RGBColor = RGBColor(0x1f, 0x4e, 0x8c);
const LEADER: RGBColor = RGBColor(0x99, 0x99, 0x99);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) struct Roofline<'a> {
    pub model: &'a str,
    pub device: &'a str,
    /// Tokens in the cache before the first step.
    pub depth: usize,
    pub memory_bytes_per_s: Option<u64>,
    pub operations: &'a [Row],
}

/// What one marker stands for.
struct Point {
    /// Operations a byte, and a second.
    intensity: f64,
    rate: f64,
    label: String,
    whole: bool,
}

impl Roofline<'_> {
    /// The drawing.
    ///
    /// # Errors
    /// Where no operation has a place on it.
    pub fn svg(&self) -> Result<String> {
        let (points, absent) = self.points();
        if points.is_empty() {
            return Err(Error::Request(
                "--plot: none of the operations read or computed anything in measurable time"
                    .into(),
            ));
        }
        let mut svg = String::new();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = self.draw(&area, &points, &absent);
        let drawn = drawn.and_then(|()| Ok(area.present()?));
        drop(area);
        drawn.map_err(|e| Error::Request(format!("--plot: {e}")))?;
        Ok(self.describe(&svg, &points))
    }

    /// The points, the step as a whole last, and the names of operations that have no place on axes of logarithms.
    fn points(&self) -> (Vec<Point>, Vec<&str>) {
        let step = whole(self.operations, self.memory_bytes_per_s);
        let (mut points, mut absent) = (Vec::new(), Vec::new());
        let kinds = self.operations.iter().map(|row| (row, false));
        for (row, whole) in kinds.chain([(&step, true)]) {
            if row.bytes == 0 || row.operations == 0 || row.total_us <= 0.0 {
                absent.push(row.name);
                continue;
            }
            let name = if whole { "whole step" } else { row.name };
            let peak = self.memory_bytes_per_s.map(|peak| peak as f64);
            let of_peak = peak.map_or(String::new(), |peak| {
                format!(", {:.1}%", 100.0 * row.bytes_per_s() / peak)
            });
            points.push(Point {
                intensity: row.operations as f64 / row.bytes as f64,
                rate: row.operations as f64 * 1e6 / row.total_us,
                label: format!("{name}: {}B/s{of_peak}", si(row.bytes_per_s())),
                whole,
            });
        }
        (points, absent)
    }

    fn draw(
        &self,
        area: &Area,
        points: &[Point],
        absent: &[&str],
    ) -> Result<(), Box<dyn std::error::Error>> {
        // Viewers with a dark background show it through otherwise.
        area.fill(&WHITE)?;
        for (i, line) in self.title().iter().enumerate() {
            let style = text(18 - 2 * i as i32, HPos::Left, VPos::Top);
            area.draw(&Text::new(short(line), (24, 16 + 26 * i as i32), style))?;
        }

        let peak = self.memory_bytes_per_s.map(|peak| peak as f64);
        let (lowest, highest) = span(points.iter().map(|p| p.intensity));
        let x = octave(lowest / 2.0, f64::floor)..octave(highest * 2.0, f64::ceil);
        let roof = peak.map(|peak| x.end * peak);
        let (lowest, highest) = span(points.iter().map(|p| p.rate).chain(roof));
        let y = decade(lowest / 2.0, f64::floor)..decade(highest, f64::ceil);
        let mut chart = ChartBuilder::on(area)
            .margin_top(80)
            .margin_left(16)
            .margin_right(LABELS)
            .margin_bottom(if absent.is_empty() { 16 } else { 40 })
            .x_label_area_size(52)
            .y_label_area_size(84)
            .build_cartesian_2d(x.clone().log_scale().base(2.0), y.clone().log_scale())?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .max_light_lines(0)
            .x_labels(12)
            .y_labels(8)
            .x_label_formatter(&|x| si(*x).trim_end().to_owned())
            .y_label_formatter(&|y| si(*y))
            .label_style(("sans-serif", 15))
            .axis_desc_style(("sans-serif", 16))
            .x_desc("operations per byte of weights (attention: of keys and values)")
            .y_desc("operations per second")
            .draw()?;

        if let Some(peak) = peak {
            // Clipped where the roof is below the lowest decade.
            let start = x.start.max(y.start / peak);
            let ends = [start, x.end].map(|x| chart.backend_coord(&(x, x * peak)));
            area.draw(&PathElement::new(ends.to_vec(), ROOF.stroke_width(2)))?;
            let (middle_x, middle_y) =
                chart.backend_coord(&((start * x.end).sqrt(), (start * x.end).sqrt() * peak));
            let label = format!("memory: {}B/s", si(peak));
            let style = text(15, HPos::Right, VPos::Bottom).color(&ROOF);
            area.draw(&Text::new(label, (middle_x - 8, middle_y - 4), style))?;
        }

        let places: Vec<(i32, i32)> = points
            .iter()
            .map(|p| chart.backend_coord(&(p.intensity, p.rate)))
            .collect();
        let left = SIZE.0 as i32 - LABELS + 24;
        let heading = peak.map_or("bytes read", |_| "bytes read, share of peak");
        let style = text(14, HPos::Left, VPos::Center);
        area.draw(&Text::new(heading, (left, HEADING), style))?;
        let heights = apart(places.iter().map(|p| p.1).collect());
        for ((point, &place), &height) in points.iter().zip(&places).zip(&heights) {
            let leader = vec![place, (left - 14, height), (left - 4, height)];
            area.draw(&PathElement::new(leader, LEADER))?;
            let mut style = text(15, HPos::Left, VPos::Center);
            if point.whole {
                style.font = style.font.style(FontStyle::Bold);
            }
            area.draw(&Text::new(point.label.as_str(), (left, height), style))?;
        }
        // Above all leaders.
        for (point, &place) in points.iter().zip(&places) {
            if point.whole {
                area.draw(&Circle::new(place, 8, POINT.stroke_width(3)))?;
            } else {
                area.draw(&Circle::new(place, 5, POINT.filled()))?;
            }
        }
        if !absent.is_empty() {
            let line = format!(
                "not shown, without bytes or operations: {}",
                absent.join(", ")
            );
            let style = text(14, HPos::Left, VPos::Bottom);
            area.draw(&Text::new(line, (24, SIZE.1 as i32 - 14), style))?;
        }
        Ok(())
    }

    fn title(&self) -> [String; 2] {
        let bandwidth = match self.memory_bytes_per_s {
            Some(peak) => format!("memory of {}B/s", si(peak as f64)),
            None => "memory of unknown bandwidth, hence no roof".into(),
        };
        [
            format!("Decode step of {}", self.model),
            format!("{}, depth {}, {bandwidth}", self.device, self.depth),
        ]
        .map(|line| line.chars().map(readable).collect())
    }

    /// `svg` with its title, and with its points in words.
    fn describe(&self, svg: &str, points: &[Point]) -> String {
        let mut described = format!(
            "<title>{}</title>\n<desc>",
            escape(&self.title().join(", "))
        );
        for p in points {
            let (label, rate) = (&p.label, si(p.rate));
            described.push_str(&escape(&format!(
                "{label}, {rate} operations per second at {:.2} per byte. ",
                p.intensity
            )));
        }
        described.push_str("</desc>\n");
        // plotters has no way to give the root a title; the root is the first tag.
        let svg = svg.replacen("<svg ", "<svg role=\"img\" ", 1);
        let at = svg.find('>').map_or(0, |end| end + 1);
        let (root, rest) = svg.split_at(at);
        format!("{root}\n{described}{}\n", rest.trim())
    }
}

fn text(size: i32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    // A font's size is its line's here, 1.24 times that of its letters.
    let font = ("sans-serif", f64::from(size) * 1.24).into_font();
    font.color(&BLACK).pos(Pos::new(horizontal, vertical))
}

/// The least and the greatest.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, 0.0), |(low, high), v| {
        (v.min(low), v.max(high))
    })
}

fn octave(value: f64, round: fn(f64) -> f64) -> f64 {
    round(value.log2()).exp2()
}

fn decade(value: f64, round: fn(f64) -> f64) -> f64 {
    10f64.powf(round(value.log10()))
}

/// `heights`, moved as little as keeps them [`LINE`] apart, in the order that they have.
fn apart(heights: Vec<i32>) -> Vec<i32> {
    let mut order: Vec<usize> = (0..heights.len()).collect();
    order.sort_by_key(|&i| heights[i]);
    let mut moved = heights;
    // Down until none is too near, then up from the bottom edge as far as that pushed them over it.
    let mut least = HEADING + LINE;
    for &i in &order {
        moved[i] = moved[i].max(least);
        least = moved[i] + LINE;
    }
    let mut most = SIZE.1 as i32 - LINE;
    for &i in order.iter().rev() {
        moved[i] = moved[i].min(most);
        most = moved[i] - LINE;
    }
    moved
}

/// Three digits and the prefix of a power of a thousand, the unit to come: `3.35 T`.
fn si(value: f64) -> String {
    let prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let (scale, prefix) = prefixes
        .into_iter()
        .find(|(scale, _)| value >= scale * 0.9995)
        .unwrap_or((1.0, ""));
    let scaled = value / scale;
    let digits = match scaled {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{scaled:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text} {prefix}")
}

/// `line`, cut where it would not fit.
fn short(line: &str) -> String {
    if line.chars().count() <= TITLE {
        return line.to_owned();
    }
    line.chars().take(TITLE - 1).chain(['…']).collect()
}

/// What XML has no way to write, not even escaped, as a replacement character: a model's name is whatever its file
/// says.
fn readable(c: char) -> char {
    match c {
        '\u{fffe}' | '\u{ffff}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::profile::Row;

    const PEAK: u64 = 2_000_000_000_000;

    fn svg(model: &str, peak: Option<u64>, operations: &[Row]) -> String {
        Roofline {
            model,
            device: "a <GPU>",
            depth: 17,
            memory_bytes_per_s: peak,
            operations,
        }
        .svg()
        .unwrap()
    }

    /// The centres of markers, the step's last.
    fn circles(document: &roxmltree::Document) -> Vec<(f64, f64)> {
        let number = |n: roxmltree::Node, name| n.attribute(name).unwrap().parse::<f64>().unwrap();
        document
            .descendants()
            .filter(|n| n.has_tag_name(("http://www.w3.org/2000/svg", "circle")))
            .map(|n| (number(n, "cx"), number(n, "cy")))
            .collect()
    }

    /// The ends of the roof.
    fn roof(document: &roxmltree::Document) -> Option<[(f64, f64); 2]> {
        let roof = document.descendants().find(|n| {
            n.attribute("points").is_some() && n.attribute("stroke") == Some("#B03A2E")
        })?;
        let ends = roof.attribute("points")?.split_whitespace().map(|end| {
            let (x, y) = end.split_once(',').unwrap();
            (x.parse().unwrap(), y.parse().unwrap())
        });
        ends.collect::<Vec<_>>().try_into().ok()
    }

    fn texts(document: &roxmltree::Document) -> Vec<String> {
        let texts = document.descendants().filter_map(|n| n.text());
        let texts = texts.map(|t| t.trim().to_owned());
        texts.filter(|t| !t.is_empty()).collect()
    }

    #[test]
    fn points_are_where_their_figures_say() {
        // At the peak with 1, 2 and 4 operations a byte, then ten times and a hundred times slower.
        let mb = 2_000_000;
        let rows = [
            Row::of("one", mb, mb, 1.0),
            Row::of("two", mb, 2 * mb, 1.0),
            Row::of("four", mb, 4 * mb, 1.0),
            Row::of("tenth", mb, 4 * mb, 10.0),
            Row::of("hundredth", mb, 4 * mb, 100.0),
        ];
        let svg = svg("m", Some(PEAK), &rows);
        let document = roxmltree::Document::parse(&svg).unwrap();
        let [one, two, four, tenth, hundredth, step] = circles(&document)[..] else {
            panic!("{svg}");
        };
        // An octave to the right each, within a pixel's rounding.
        assert!((two.0 - one.0 - (four.0 - two.0)).abs() <= 2.0, "{svg}");
        assert!(two.0 > one.0);
        // A decade down each.
        let decade = tenth.1 - four.1;
        assert!((hundredth.1 - tenth.1 - decade).abs() <= 2.0, "{svg}");
        assert!(decade > 0.0);
        assert_eq!((tenth.0, hundredth.0), (four.0, four.0));
        // The first three are on the roof, two octaves of which are log10(4) decades up.
        assert!((one.1 - four.1 - decade * 4f64.log10()).abs() <= 2.0);
        let [start, end] = roof(&document).unwrap();
        for (x, y) in [one, two, four] {
            let on = start.1 + (end.1 - start.1) * (x - start.0) / (end.0 - start.0);
            assert!((on - y).abs() <= 2.0, "{on} {y} {svg}");
        }
        // The whole: 15 operations for 5 bytes, in 113 us.
        let octave = two.0 - one.0;
        assert!((step.0 - one.0 - octave * 3f64.log2()).abs() <= 2.0);
        let slower = 4.0 * mb as f64 / 1.0 / (15.0 * mb as f64 / 113.0);
        assert!((step.1 - four.1 - decade * slower.log10()).abs() <= 2.0);
        let texts = texts(&document);
        for label in [
            "four: 2 TB/s, 100.0%",
            "tenth: 200 GB/s, 10.0%",
            "whole step: 88.5 GB/s, 4.4%",
            "memory: 2 TB/s",
        ] {
            assert!(texts.iter().any(|t| t == label), "{label}: {texts:?}");
        }
    }

    #[test]
    fn any_name_makes_valid_xml_that_says_it() {
        let name = "a<b> & \"c\" 'd' ]]> \u{1}\u{ffff}é";
        let svg = svg(name, Some(PEAK), &[Row::of("qkv", 1000, 2000, 1.0)]);
        let document = roxmltree::Document::parse(&svg).unwrap();
        let root = document.root_element();
        assert_eq!(root.attribute("role"), Some("img"));
        let title = root.first_element_child().unwrap();
        assert_eq!(title.tag_name().name(), "title");
        let said = "Decode step of a<b> & \"c\" 'd' ]]> \u{fffd}\u{fffd}é";
        assert_eq!(
            title.text(),
            Some(format!("{said}, a <GPU>, depth 17, memory of 2 TB/s").as_str())
        );
        let texts = texts(&document);
        assert!(texts.iter().any(|t| t == said), "{texts:?}");
        // The background is white from edge to edge.
        let background = root
            .children()
            .find(|n| n.has_tag_name(("http://www.w3.org/2000/svg", "rect")));
        let of = |name| background.and_then(|b| b.attribute(name));
        assert_eq!(
            ["width", "height", "fill"].map(of),
            [Some("1000"), Some("620"), Some("#FFFFFF")]
        );
    }

    #[test]
    fn without_a_bandwidth_there_is_no_roof() {
        let rows = [Row::of("qkv", 1000, 2000, 1.0), Row::of("idle", 0, 0, 1.0)];
        let svg = svg("m", None, &rows);
        let document = roxmltree::Document::parse(&svg).unwrap();
        assert_eq!(roof(&document), None);
        assert_eq!(circles(&document).len(), 2);
        let texts = texts(&document);
        assert!(texts.iter().any(|t| t.ends_with("no roof")), "{texts:?}");
        assert!(
            texts.iter().any(|t| t.ends_with("operations: idle")),
            "{texts:?}"
        );
        assert!(!svg.contains('%'), "{svg}");
    }

    #[test]
    fn nothing_measured_is_an_error() {
        let roofline = Roofline {
            model: "m",
            device: "d",
            depth: 0,
            memory_bytes_per_s: Some(PEAK),
            operations: &[Row::of("qkv", 1000, 2000, 0.0)],
        };
        assert!(roofline.svg().is_err());
    }

    #[test]
    fn labels_keep_apart_and_inside() {
        assert_eq!(apart(vec![50, 300]), [HEADING + LINE, 300]);
        assert_eq!(apart(vec![205, 200, 204]), [240, 200, 220]);
        assert_eq!(apart(vec![599, 600, 200]), [580, 600, 200]);
    }

    #[test]
    fn numbers_have_prefixes() {
        for (value, text) in [
            (0.25, "0.25 "),
            (8.0, "8 "),
            (999.9, "1 k"),
            (1e11, "100 G"),
            (3.352e12, "3.35 T"),
            (1.2345e10, "12.3 G"),
        ] {
            assert_eq!(si(value), text);
        }
    }
}
