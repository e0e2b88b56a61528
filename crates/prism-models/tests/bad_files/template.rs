//! Hostile chat templates.

use prism_models::template::{ChatTemplate, MAX_OUTPUT_BYTES, MAX_TEMPLATE_BYTES};
use prism_models::{Message, TemplateError};

fn render(source: &str) -> Result<String, TemplateError> {
    let messages = [Message::new("user", "Hi")];
    ChatTemplate::new(source)?.render(&messages, true, "<s>", "</s>")
}

#[test]
fn does_an_endless_loop_run_out_of_fuel() {
    let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
                  {% endfor %}{% endfor %}{% endfor %}";
    assert!(matches!(render(nested), Err(TemplateError::OutOfFuel { .. })));
}

#[test]
fn does_an_endless_recursion_fail() {
    let source = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    let error = render(source).unwrap_err();
    assert!(
        matches!(error, TemplateError::Render { .. } | TemplateError::OutOfFuel { .. }),
        "{error}"
    );
}

#[test]
fn is_a_huge_output_refused() {
    let source = "{% for i in range(9000) %}{{ 'xxxxxxxxxx' * 100 }}{% endfor %}";
    let error = render(source).unwrap_err();
    assert!(matches!(error, TemplateError::OutputTooLong { limit: MAX_OUTPUT_BYTES }), "{error}");
}

#[test]
fn is_a_huge_value_never_built() {
    for source in [
        "{% set x = 'x' * 10000000000 %}",
        "{% set n = namespace(x='xxxxxxxx') %}\
         {% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}\
         {% for i in range(30) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | tojson }}",
    ] {
        let error = render(source).unwrap_err();
        let render = matches!(error, TemplateError::Render { .. });
        assert!(render || matches!(error, TemplateError::OutOfFuel { .. }), "{error}");
    }
}

#[test]
fn do_values_nested_as_deep_as_the_fuel_lasts_spare_the_stack() {
    let build = "{% set n = namespace(x=[1]) %}{% for j in range(9999) %}\
                 {% for i in range(LAST) %}{% set n.x = [n.x] %}{% endfor %}{% endfor %}";
    let endless = build.replace("LAST", "9999");
    assert!(matches!(render(&endless), Err(TemplateError::OutOfFuel { .. })));
    let some = build.replace("9999", "4").replace("LAST", "9999");
    assert!(matches!(
        render(&format!("{some}{{{{ n.x | tojson }}}}")),
        Err(TemplateError::Render { .. })
    ));
    let printed = render(&format!("{some}{{{{ n.x }}}}"));
    assert!(printed.is_ok() || matches!(printed, Err(TemplateError::OutOfFuel { .. })));
}

#[test]
fn are_undefined_variables_and_their_attributes_empty() {
    assert_eq!(render("[{{ absent }}{{ absent.deep.deeper }}{{ absent['x'] }}]").unwrap(), "[]");
    assert_eq!(render("{% if date_string is defined %}x{% endif %}").unwrap(), "");
    assert_eq!(render("{% for x in absent %}x{% endfor %}").unwrap(), "");
}

#[test]
fn is_an_exception_of_the_template_passed_on() {
    for source in [
        "{{ raise_exception('Roles must alternate') }}",
        "{% macro f() %}{{ raise_exception('Roles must alternate') }}{% endmacro %}{{ f() }}",
    ] {
        let error = render(source).unwrap_err();
        let expected = "Roles must alternate";
        assert!(matches!(&error, TemplateError::Raised { message } if message == expected));
    }
}

#[test]
fn is_a_bad_date_format_an_error() {
    let error = render("{{ strftime_now('%!') }}").unwrap_err();
    assert!(
        matches!(&error, TemplateError::Render { message } if message.contains("%!")),
        "{error}"
    );
}

#[test]
fn do_attribute_tricks_lead_nowhere() {
    assert_eq!(render("{{ ''.__class__.__mro__ }}").unwrap(), "");
    assert_eq!(render("{{ messages.__init__.__globals__ }}").unwrap(), "");
    for source in [
        "{{ ''.__class__() }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__() }}",
        "{% include 'other' %}",
        "{% import 'other' as o %}",
    ] {
        assert!(matches!(render(source), Err(TemplateError::Render { .. })), "{source}");
    }
}

#[test]
fn are_templates_that_do_not_parse_refused() {
    for source in ["{% if %}", "{{", "{% for x in %}", &"{{ ".repeat(1000)] {
        assert!(matches!(ChatTemplate::new(source), Err(TemplateError::Syntax(_))));
    }
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(matches!(ChatTemplate::new(deep), Err(TemplateError::Syntax(_))));
}

#[test]
fn are_templates_that_are_too_long_or_no_text_refused() {
    let error = ChatTemplate::new("x".repeat(MAX_TEMPLATE_BYTES + 1)).unwrap_err();
    assert!(matches!(error, TemplateError::TooLong { limit: MAX_TEMPLATE_BYTES, .. }));
    assert!(matches!(ChatTemplate::from_bytes(vec![0xff]), Err(TemplateError::NotUtf8(_))));
    assert!(matches!(ChatTemplate::from_tokenizer_config(b"{"), Err(TemplateError::Json(_))));
}
