//! Do the constructs that chat templates of Llama 3, Qwen2.5 and Qwen3 are made of work? The
//! templates here are our own.

use prism_models::{ChatTemplate, Message, TemplateError, TemplateVariables};
use serde_json::{Value, json};

fn render(source: &str, messages: Value, variables: Value) -> Result<String, TemplateError> {
    let mut given = TemplateVariables::default();
    for (name, value) in variables.as_object().unwrap() {
        given.set(name, value)?;
    }
    let messages = messages.as_array().unwrap();
    ChatTemplate::new(source)?.render_with(messages, true, "<bos>", "<eos>", &given)
}

/// Llama 3: the date, a system message that is cut off, `set` of a loop's own list, trimmed
/// content, calls of tools in the order of their members.
const DATED: &str = "\
{{- bos_token }}
{%- set today = date_string if date_string is defined else strftime_now('%Y') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set head = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set head = '' %}
{%- endif %}
{{- '[head]' + today + ' ' + head + '[end]' }}
{%- if tools is not none and not inline is defined %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '[' + message['role'] + ']' + message['content'] | trim + '[end]' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '[call]' + call.name }}
        {%- for name, value in call.arguments | items %}
            {{- (', ' if not loop.first else ' ') + name + '=' + (value | string) }}
        {%- endfor %}
        {{- '[end]' }}
    {%- else %}
        {{- '[result]' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '[end]' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}";

#[test]
fn do_the_constructs_of_llama_3_work() {
    let messages = json!([
        {"role": "system", "content": "  Be kind. "},
        {"role": "user", "content": " Hi\n"},
    ]);
    assert_eq!(
        render(DATED, messages, json!({"date_string": "26 Jul 2024"})).unwrap(),
        "<bos>[head]26 Jul 2024 Be kind.[end][user]Hi[end][assistant]"
    );
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let text = render(DATED, messages.clone(), json!({})).unwrap();
    let year = text.strip_prefix("<bos>[head]").and_then(|rest| rest.get(..4)).unwrap();
    assert!(year.parse::<u32>().unwrap() >= 2026, "{text}");
}

#[test]
fn are_tools_shown_with_their_members_in_order() {
    let mut given = TemplateVariables::default();
    given.set("date_string", "D").unwrap();
    let tools = r#"[{"type": "function", "function": {"name": "sum", "arity": 2}}]"#;
    given.set_json("tools", tools).unwrap();
    let template = ChatTemplate::new(DATED).unwrap();
    let text = template.render_with(&[Message::new("user", "Hi")], true, "", "", &given).unwrap();
    let tool = "{\n  \"type\": \"function\",\n  \"function\": {\n    \"name\": \"sum\",\n    \
                \"arity\": 2\n  }\n}";
    assert_eq!(text, format!("[head]D [end]{tool}[user]Hi[end][assistant]"));
}

#[test]
fn are_calls_of_tools_and_their_results_rendered_and_refused() {
    let call = |name: &str| json!({"function": {"name": name, "arguments": {"b": 2, "a": [1]}}});
    let calls = |calls: Value| {
        json!([
            {"role": "user", "content": "Add."},
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": {"sum": 3, "exact": true}},
            {"role": "tool", "content": "3"},
        ])
    };
    let date = json!({"date_string": "D"});
    let text = render(DATED, calls(json!([call("sum")])), date.clone()).unwrap();
    assert_eq!(
        text,
        "<bos>[head]D [end][user]Add.[end][call]sum a=[1], b=2[end]\
         [result]{\"exact\": true, \"sum\": 3}[end][result]3[end][assistant]"
    );
    let error = render(DATED, calls(json!([call("a"), call("b")])), date).unwrap_err();
    assert!(matches!(error, TemplateError::Raised { message } if message == "one call at a time"));
}

/// Qwen2.5 and Qwen3: a namespace that a loop over the messages backwards changes, neighbours by
/// index, thoughts cut off answers that are history, and a switch for thinking.
const THINKING: &str = "\
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string and not (message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<s>' + message.role + '\\n' + content + '<e>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<s>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<s>assistant\\n' + content }}
        {%- endif %}
        {{- '<e>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}{{- '<s>user' }}{%- endif %}
        {{- '\\n<result>\\n' + content + '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<e>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";

#[test]
fn do_the_constructs_of_qwen_3_work() {
    let history = json!([
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
        {"role": "user", "content": "And 3+3?"},
    ]);
    let right = "<s>user\n2+2?<e>\n<s>assistant\n4<e>\n<s>user\nAnd 3+3?<e>\n<s>assistant\n";
    assert_eq!(render(THINKING, history.clone(), json!({})).unwrap(), right);
    assert_eq!(render(THINKING, history.clone(), json!({"enable_thinking": true})).unwrap(), right);
    assert_eq!(
        render(THINKING, history, json!({"enable_thinking": false})).unwrap(),
        format!("{right}<think>\n\n</think>\n\n")
    );
}

#[test]
fn do_results_of_tools_gather_and_thoughts_after_the_last_question_stay() {
    let messages = json!([
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "\nlook it up\n"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "user", "content": "<result>x</result>"},
    ]);
    assert_eq!(
        render(THINKING, messages, json!({})).unwrap(),
        "<s>user\nQ<e>\n<s>assistant\n<think>\nlook it up\n</think>\n\n<e>\n\
         <s>user\n<result>\n1\n</result>\n<result>\n2\n</result><e>\n\
         <s>user\n<result>x</result><e>\n<s>assistant\n"
    );
}

#[test]
fn is_a_variable_known_to_be_read_or_not() {
    let template = ChatTemplate::new(THINKING).unwrap();
    assert!(template.reads("enable_thinking") && template.reads("messages"));
    assert!(!template.reads("thinking") && !template.reads("ns"));
    assert!(ChatTemplate::new(DATED).unwrap().reads("date_string"));
}

#[test]
fn do_other_constructs_of_published_templates_work() {
    let two = json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]);
    for (source, right) in [
        // Roles that must alternate, by parity.
        (
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{% endfor %}",
            None,
        ),
        ("{{ ['a', 'code', 'b'] | reject('equalto', 'code') | join(', ') }}", Some("a, b")),
        ("{{ messages | map(attribute='content') | join('/') }}", Some("a/b")),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", Some("2")),
        ("{% for m in messages if m.content != 'a' %}{{ m.content }}{% endfor %}", Some("b")),
        ("{{ '%s|%d' | format('x', 3) }}", Some("x|3")),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content.upper() }}{% break %}{% endfor %}",
            Some("B"),
        ),
        (
            "{% set d = {'k': 1} %}{{ d.get('k') }}{{ d.get('x', 'no') }}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}",
            Some("1nok1"),
        ),
        (
            "{% macro show(m, end='!') -%}{{ m.content ~ end }}{%- endmacro %}{{ show(messages[-1]) }}",
            Some("b!"),
        ),
        ("{{ 'x' if messages[0].name is defined and messages[0].name else 'y' }}", Some("y")),
        (
            "{{ 'a b c'.split(' ')[1:] | join('') }}{{ ' x '.strip() }}{{ 'abc'[:2] }}{{ 'title case'.title() }}",
            Some("bcxabTitle Case"),
        ),
        ("{{ tools is none }}{{ documents is defined }}{{ none is none }}", Some("TrueTrueTrue")),
    ] {
        match (render(source, two.clone(), json!({})), right) {
            (Ok(text), Some(right)) => assert_eq!(text, right, "{source}"),
            (Err(TemplateError::Raised { message }), None) => assert_eq!(message, "alternate"),
            (got, _) => panic!("{source}: {got:?}"),
        }
    }
}

#[test]
fn are_plain_messages_rendered_as_messages_of_any_form() {
    let source = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}";
    let template = ChatTemplate::new(source).unwrap();
    let plain = [Message::new("user", "Hi \"é\"\n")];
    assert_eq!(template.render(&plain, true, "", "").unwrap(), "user:Hi \"é\"\n;");
}
