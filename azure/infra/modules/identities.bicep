// Who acts: the workspace, the nodes of a cluster, an endpoint, and a workflow on GitHub that needs no secret.
param name string
param location string
param tags object
param githubRepository string

// The environments of .github/workflows/deploy.yml that log in: a token of any other branch or job is refused.
var environments = [
  'images'
  'staging'
  'production'
]
var withWorkflow = !empty(githubRepository)

resource workspace 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: 'id-${name}-workspace'
  location: location
  tags: tags
}

resource compute 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: 'id-${name}-compute'
  location: location
  tags: tags
}

resource endpoint 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = {
  name: 'id-${name}-endpoint'
  location: location
  tags: tags
}

resource workflow 'Microsoft.ManagedIdentity/userAssignedIdentities@2023-01-31' = if (withWorkflow) {
  name: 'id-${name}-workflow'
  location: location
  tags: tags
}

// One after the other: the service refuses two at once for the same identity.
@batchSize(1)
resource trusted 'Microsoft.ManagedIdentity/userAssignedIdentities/federatedIdentityCredentials@2023-01-31' = [for environment in environments: if (withWorkflow) {
  parent: workflow
  name: 'github-${environment}'
  properties: {
    issuer: 'https://token.actions.githubusercontent.com'
    subject: 'repo:${githubRepository}:environment:${environment}'
    audiences: [
      'api://AzureADTokenExchange'
    ]
  }
}]

output workspaceId string = workspace.id
output workspacePrincipalId string = workspace.properties.principalId
output computeName string = compute.name
output computePrincipalId string = compute.properties.principalId
output endpointName string = endpoint.name
output endpointPrincipalId string = endpoint.properties.principalId
output workflowPrincipalId string = withWorkflow ? workflow.properties.principalId : ''
output workflowClientId string = withWorkflow ? workflow.properties.clientId : ''
