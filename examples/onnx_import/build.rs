//! Brings attention_block.onnx into Burn twice: as it is, and with Prism for its attention.

use burn_onnx::ModelGen;
use burn_onnx::ext::proc_macro2::{Ident, Span, TokenStream};
use burn_onnx::ext::quote::quote;
use burn_onnx::ext::{
    CodegenContext, Field, Node, NodeType, OpOverride, ProcessError, arg_to_ident,
};

const MODEL: &str = "attention_block.onnx";

fn main() {
    println!("cargo::rerun-if-changed={MODEL}");
    ModelGen::new().input(MODEL).out_dir("dense").run_from_script();
    ModelGen::new().input(MODEL).out_dir("prism").register_op_override(Prism).run_from_script();
}

/// Puts a field of type `crate::Attention` in the place of every `Attention` node.
struct Prism;

impl OpOverride for Prism {
    fn target(&self) -> NodeType {
        NodeType::Attention
    }

    fn field(&self, node: &Node) -> Result<Option<Field>, ProcessError> {
        let name = Ident::new(node.name(), Span::call_site());
        let init = quote!(let #name = crate::Attention::default(););
        Ok(Some(Field::new(node.name(), quote!(crate::Attention), init)))
    }

    fn forward(
        &self,
        node: &Node,
        context: &mut CodegenContext<'_, '_>,
    ) -> Result<TokenStream, ProcessError> {
        let Node::Attention(attention) = node else {
            return refuse("is no attention");
        };
        let config = &attention.config;
        // Prism is causal, starts at position 0 here, and takes heads, not hidden states.
        if !config.is_causal {
            return refuse("isn't causal; a mask computed in the graph can't be checked here");
        }
        if attention.inputs.iter().skip(3).any(|input| !input.is_optional()) {
            return refuse("has a mask or a cache of its own");
        }
        if attention.outputs.len() != 1 || config.softcap != 0.0 {
            return refuse("has a soft cap, or hands out its scores");
        }
        if config.q_num_heads.is_some() {
            return refuse("splits the heads itself: export it with [batch, heads, n, head_dim]");
        }
        let [q, k, v] = [0, 1, 2].map(|i| context.arg(&attention.inputs[i]));
        let scale = match config.scale {
            Some(scale) => quote!(Some(#scale)),
            None => quote!(None),
        };
        let (field, output) =
            (Ident::new(node.name(), Span::call_site()), arg_to_ident(&attention.outputs[0]));
        Ok(quote! { let #output = self.#field.forward(#q, #k, #v, #scale); })
    }
}

fn refuse<T>(why: &str) -> Result<T, ProcessError> {
    Err(ProcessError::Custom(format!("it {why}")))
}
