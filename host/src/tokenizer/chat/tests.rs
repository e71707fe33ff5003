use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::Error;
use super::ChatTemplate;

fn try_render(source: &str, messages: &Value) -> Result<String, Error> {
    ChatTemplate::new(source, "<s>", "</s>").render(messages, None, true)
}

/// The template's text where the messages do not matter.
fn render(source: &str) -> String {
    try_render(source, &json!([])).unwrap_or_else(|e| panic!("{source}: {e}"))
}

fn error(source: &str) -> String {
    match try_render(source, &json!([])) {
        Ok(text) => panic!("{source} gave {text:?}"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_plain_chat() {
    let source = "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}<|assistant|>\n{% endif %}";
    let messages = json!([{"role": "user", "content": " <b>&'\" "}]);
    assert_eq!(
        try_render(source, &messages).unwrap(),
        "<s><|user|>\n<b>&'\"</s>\n<|assistant|>\n"
    );
    let template = ChatTemplate::new(source, "<s>", "</s>");
    assert_eq!(
        template.render(&messages, None, false).unwrap(),
        "<s><|user|>\n<b>&'\"</s>\n"
    );
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    assert_eq!(
        render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n"),
        "a\n  b\nc"
    );
    assert_eq!(render("a\n  {{ 'b' }}\nc\n\n"), "a\n  b\nc\n");
    assert_eq!(render("a  {%- if true -%}  b  {%- endif +%}\nc"), "ab\nc");
}

#[test]
fn absent_tools_are_none() {
    assert_eq!(
        render(
            "{{ tools is defined }} {{ tools is none }} {% if tools %}x{% endif %}{{ documents }}"
        ),
        "True True None"
    );
    let tools = json!([{"type": "function"}]);
    let shown = ChatTemplate::new("{{ tools }}|{{ tools | tojson }}", "", "")
        .render(&json!([]), Some(&tools), false)
        .unwrap();
    assert_eq!(shown, r#"[{'type': 'function'}]|[{"type": "function"}]"#);
}

#[test]
fn tojson_is_json_dumps() {
    let messages =
        json!({"z": 1, "a": [1.0, 1e-7, 1e22, -2.5, true, null], "ü\"\\\n\u{1}<&'": {}, "e": []});
    assert_eq!(
        try_render("{{ messages | tojson }}", &messages).unwrap(),
        r#"{"z": 1, "a": [1.0, 1e-07, 1e+22, -2.5, true, null], "ü\"\\\n\u0001<&'": {}, "e": []}"#
    );
    assert_eq!(
        try_render(
            "{{ messages | tojson(indent=2) }}",
            &json!({"a": [1, {"b": 2}], "c": {}})
        )
        .unwrap(),
        "{\n  \"a\": [\n    1,\n    {\n      \"b\": 2\n    }\n  ],\n  \"c\": {}\n}"
    );
    assert_eq!(
        try_render(
            "{{ messages | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
            &json!({"b": "é😀", "a": 1})
        )
        .unwrap(),
        r#"{"a":1,"b":"\u00e9\ud83d\ude00"}"#
    );
}

#[test]
fn values_print_as_in_python() {
    assert_eq!(
        render(
            r#"{{ true }} {{ none }} {{ 1.0 }} {{ 7 }} {{ [1, 'a', none] }} {{ {'k': "it's"} }} {{ missing }}|"#
        ),
        r#"True None 1.0 7 [1, 'a', None] {'k': "it's"} |"#
    );
    assert_eq!(render("{{ 'a' ~ 1 ~ true ~ none }}"), "a1TrueNone");
    assert_eq!(
        render("{{ [1, 2] | join('-') }} {{ ', '.join(['a', 'b']) }}"),
        "1-2 a, b"
    );
}

#[test]
fn operators_still_compute() {
    assert_eq!(
        render(
            "{{ 1 + 2 }} {{ 2 * 3 }} {{ 1.5 + 1 }} {{ 0.5 * 3 }} {{ 'a' + 'b' }} {{ 'ab' * 2 }} {{ 3 * '-' }} {{ [1] + [2] }} {{ [0] * 2 }} {{ -1 * 'x' }}|"
        ),
        "3 6 2.5 1.5 ab abab --- [1, 2] [0, 0] |"
    );
    // Not folded while compiling.
    assert_eq!(
        render(
            "{% set n = messages | length %}{{ n + 1 }} {{ (n + 2) * 3 }} {{ n - 1 }} {{ 7 // (n + 2) }} {{ (n + 7) % 4 }}"
        ),
        "1 6 -1 3 3"
    );
    assert_eq!(
        render(
            "{% for i in range(5) if i % 2 == 0 and i > 0 or i == 1 %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}{% else %}none{% endfor %}"
        ),
        "1:1,2:2,3:4"
    );
    assert_eq!(
        render(
            "{% macro f(x, y=2) %}[{{ x + y }}]{% endmacro %}{% set ns = namespace(t='') %}{% for i in range(3) %}{% if i == 2 %}{% break %}{% endif %}{% set ns.t = ns.t + f(i) %}{% endfor %}{{ ns.t }}{% set cap %}<{{ f(5, y=1) }}>{% endset %}{{ cap }}"
        ),
        "[2][3]<[6]>"
    );
    assert!(error("{{ 'a' + missing }}").contains("undefined"));
    assert!(error("{{ 'a' + 1 }}").contains("unsupported operands of +"));
}

#[test]
fn python_methods() {
    assert_eq!(
        render(
            "{{ '  a b '.strip() }}|{{ 'xax'.strip('x') }}|{{ 'a b  c'.split() }}|{{ 'a,b'.split(',')[-1] }}"
        ),
        "a b|a|['a', 'b', 'c']|b"
    );
    assert_eq!(
        render(
            "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('x') }} {{ 'a-a'.replace('a', 'b') }} {{ 'aAa'.upper() }} {{ 'aba'.count('a') }} {{ 'ab'.count('') }}"
        ),
        "True False b-b AAA 2 3"
    );
    assert_eq!(
        render(
            "{% set d = {'a': 1} %}{% for k, v in d.items() %}{{ k }}={{ v }}{% endfor %} {{ d.get('x', 'none') }} {{ d.keys() | list }}"
        ),
        "a=1 none ['a']"
    );
    assert_eq!(
        render("{{ 'a\nb\n\nc' | indent(2) }}|{{ 'x\ny' | indent(width=1, first=true) }}"),
        "a\n  b\n\n  c| x\n y"
    );
    assert_eq!(
        render(
            "{{ ' A ' | trim | lower }} {{ 'a b' | title }} {{ 'aB' | capitalize }} {{ ['b', 'a'] | map('upper') | sort | list }}"
        ),
        "a A B Ab ['A', 'B']"
    );
    assert_eq!(
        render("{{ 'lstrip'.lstrip('l') }} {{ 'prefix'.removeprefix('pre') }} {{ '<' | escape }}"),
        "strip fix &lt;"
    );
}

#[test]
fn generation_tags_mean_nothing() {
    assert_eq!(render("a {%- generation %}b{% endgeneration %}c"), "abc");
    assert_eq!(render("a{%generation-%} b {% endgeneration %}\nc"), "ab c");
}

#[test]
fn raise_exception_is_told_apart() {
    let refused = try_render("{{ raise_exception('roles must alternate') }}", &json!([]));
    assert!(matches!(refused, Err(Error::TemplateRefused(m)) if m == "roles must alternate"));
}

#[test]
fn strftime_now_gives_the_date() {
    let year: i32 = render("{{ strftime_now('%Y') }}").parse().unwrap();
    assert!((2024..3000).contains(&year));
    let date = render("{{ strftime_now('%d %b %Y') }}");
    assert_eq!(date.split(' ').count(), 3);
    assert!(error("{{ strftime_now('%999999999d') }}").contains("no format of dates"));
}

#[test]
fn errors_say_where() {
    assert_eq!(
        error("{% for m in messages %}{{ m['content' }}"),
        "chat template: line 1: syntax error: unexpected `}`, expected `]`"
    );
    assert!(error("a\nb\n{{ nothing() }}").starts_with("chat template: line 3: "));
    assert!(error("a\nb\n{{ 'a' + 1 }}").starts_with("chat template: line 3: "));
}

/// Each must fail, soon, and with an error rather than a crash.
#[test]
fn hostile_templates_fail_within_bounds() {
    let deep_sum = format!("{{{{ missing{} }}}}", " ~ 'a'".repeat(5000));
    let deep_index = format!("{{{{ messages{} }}}}", "[0]".repeat(5000));
    let deep_filter = format!("{{{{ messages{} }}}}", "|e".repeat(4000));
    let deep_concat = format!("{{{{ messages{} }}}}", "~a".repeat(4000));
    let deep_not = format!("{{{{ {}1 }}}}", "not ".repeat(2000));
    let deep_minus = format!("{{{{ ({}1) }}}}", "-".repeat(8000));
    let long_tag = format!("{{{{ 'a'{} }}}}", " ~ 'a'".repeat(20_000));
    let nested_if = "{% if true %}".repeat(20_000) + &"{% endif %}".repeat(20_000);
    let nested_if_small = "{% if true %}".repeat(3000) + &"{% endif %}".repeat(3000);
    let big_raw = format!(
        "{{% set x %}}{{% for i in range(100000) %}}{}{{% endfor %}}{{% endset %}}",
        "a".repeat(50_000)
    );
    let hostile = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}x",
        "{% set x = range(1000000000000) | list %}{{ x | length }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        &nested_if,
        &nested_if_small,
        "{% for m in messages %}{{ m['content' }}",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}{{ 'a' * 10000000000 }}",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'a' * 99999999 }}",
        "{{ 'a' * 10000 * 9999 }}",
        "{{ 'ab' * 10 ** 7 }}",
        "{% set n = 99999999 %}{{ 'a' * n }}",
        "{% set x = [0] * 10000000000000 %}{{ x | sort }}",
        "{% set x = (0, 1) * 10000000000000 %}{{ x | last }}",
        "{% set n = 10000000000000 %}{% set x = [0] * n %}{{ x | unique }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | list | length }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | string | length }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(90000) %}{% set ns.s = [ns.s] %}{% endfor %}",
        "{% set ns = namespace(s=1) %}{% set ns.s = ns %}{{ ns }}",
        "{% set ns = namespace(s=1) %}{% set ns.s = [ns] %}{{ ns.s }}",
        "{% set ns = namespace(s=1) %}{% set ns.s = {'a': ns} %}{{ ns | tojson }}",
        "{% set s = 'a' * 100000 %}{% for i in range(1000) %}{{ s }}{% endfor %}",
        "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
        "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
        "{% set s = 'a' * 100000 %}{{ s.join(range(100000)) }}",
        "{% set s = 'a' * 100000 %}{{ range(100000) | join(s) }}",
        "{% set s = 'a' * 1000000 %}{% set l = [s] * 1000 %}{{ l | upper | length }}",
        "{% set s = '\n' * 100000 %}{{ s | indent(100000, true, true) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% set ns = namespace(n=2) %}{% for i in range(100000) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% set s = 'a' * 1000000 %}{% for i in range(100000) %}{% if s + 'b' in s %}{% endif %}{% endfor %}",
        &deep_sum,
        &deep_filter,
        &deep_concat,
        &deep_not,
        &deep_minus,
        &deep_index,
        &long_tag,
        &big_raw,
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{{ debug() }}",
        "{{ raise_exception() }}",
    ];
    for source in hostile {
        let started = Instant::now();
        let result = try_render(source, &json!([]));
        let took = started.elapsed();
        let shown: String = source.chars().take(80).collect();
        // Deep rather than large: these only have to end.
        let deep = [
            &deep_sum,
            &deep_filter,
            &deep_concat,
            &deep_not,
            &deep_minus,
        ];
        if !deep.iter().any(|d| d.as_str() == source) {
            assert!(
                result.is_err(),
                "{shown} gave {} bytes",
                result.map_or(0, |t| t.len())
            );
        }
        // The limit is 0.8 s; a loaded machine gets twice as much again.
        assert!(took < Duration::from_millis(2400), "{shown} took {took:?}");
    }
}
